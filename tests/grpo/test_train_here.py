"""`grpo.train` in this process (`tests/grpo/here.py`): whole runs of every kind. They are compared with
the run `alike`: only runs of the same kind are equal to the bit.
"""

import collections
import gc
import json
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest

from convert.export_lora import export
from grpo import setup
from grpo import train as training
from grpo.learning import train_state
from grpo.records import run_log
from grpo.settings.budget import Budget, Spent
from tests.grpo.here import train_tiny
from tests.grpo.tiny_run import (
    arrays_of,
    assert_same,
    newest,
    records_of,
    result,
    write_recipe,
)
from tests.rewards.serving import TOKEN, Command
from wan_jax.command_line.cli import UserError
from wan_jax.distributed import multihost
from wan_jax.storage.checkpoint import Checkpoints
from wan_jax.storage.trained_weights import load_trained


@pytest.fixture(scope="module")
def alike(model, tmp_path_factory):
    """Two epochs in this process, undisturbed: the folder."""
    config, run = write_recipe(model, tmp_path_factory.mktemp("alike"))
    train_tiny(config, "epochs=2")
    return run


@pytest.mark.slow
def test_a_continued_run_may_change_its_learning_rate(alike, tmp_path, capsys):
    """The change is printed and recorded, also those of earlier starts; the way back leaves none."""
    run = tmp_path / "run"
    shutil.copytree(alike, run)
    config = alike.parent / "recipe.py"

    def changes(epochs, rate):
        train_tiny(config, f"run_dir={run}", f"epochs={epochs}", f"train.learning_rate={rate}")
        printed = re.findall(
            r"^changed since epoch (\d+): (.*)$", capsys.readouterr().out, re.MULTILINE
        )
        return printed, json.loads((run / "config.json").read_text()).get("changes")

    before = json.loads((run / "config.json").read_text())["train"]["learning_rate"]
    ((epoch, printed),), recorded = changes(3, 1e-5)
    rate = f"train.learning_rate {before} -> 1e-05"
    assert epoch == "2" and rate in printed and "epochs 2 -> 3" in printed
    assert recorded == {"2": ["epochs 2 -> 3", rate]}
    assert [r["epoch"] for r in run_log.read_metrics(run)] == [1, 2, 3]
    assert changes(3, 1e-5) == ([], recorded)
    assert changes(3, before)[1] == recorded | {"3": [f"train.learning_rate 1e-05 -> {before}"]}


@pytest.mark.slow
def test_a_report_at_every_evaluation_whose_failure_is_a_warning(recipe, monkeypatch, capsys):
    config, run = recipe
    write, found = training.run_report.write_report, []

    def fail_once(folder, pairs):
        found.append((pairs, [r["epoch"] for r in run_log.read_evaluations(folder)]))
        if len(found) == 1:
            raise ZeroDivisionError
        return write(folder, pairs)

    monkeypatch.setattr(training.run_report, "write_report", fail_once)
    train_tiny(config, "epochs=2", "eval.every=1")
    assert found == [(False, [0]), (False, [0, 1]), (True, [0, 1, 2])] and newest(run) == 2
    assert capsys.readouterr().out.count("warning: the report was not written") == 1
    assert "after 2 epochs: the run is finished" in (run / "report.html").read_text()
    assert "ZeroDivisionError" in (run / "run.log").read_text()


@pytest.mark.slow
def test_full_fine_tuning(recipe):
    config, run = recipe
    train_tiny(config, "lora.rank=0", "epochs=2", "train.learning_rate=1e-5")
    arrays, (metrics, _) = arrays_of(run), records_of(run)
    assert any(k.startswith("trained") and "patch_embed" in k for k in arrays)
    assert not any("lora" in k for k in arrays)
    assert all(r["ratio_max_error"] <= 1e-5 for r in metrics)


@pytest.mark.slow
@pytest.mark.parametrize("offload", [False, True])
def test_all_weights_in_a_compact_form_resume_bit_for_bit(recipe, tmp_path, offload):
    """Moments in bfloat16 and no average, as in a checkpoint: the weights are in it once."""
    config, run = recipe
    settings = ("lora.rank=0", "train.learning_rate=1e-5", "train.moments_dtype=bfloat16")
    settings += ("train.ema_decay=0", "eval.every=1", f"train.offload_optimiser={offload}")
    train_tiny(config, *settings, "epochs=2")
    other = tmp_path / "continued"
    for epochs in (1, 2):
        train_tiny(config, *settings, f"epochs={epochs}", f"run_dir={other}")
    assert_same(result(other), result(run))
    arrays = arrays_of(run)
    weights = sum(v.size for k, v in arrays.items() if k.startswith("trained"))
    assert not any(k.startswith("state['trainable']") for k in arrays)
    opt = [v for k, v in arrays.items() if k.startswith("state['opt']") and v.ndim]
    assert sum(v.size for v in opt) == 2 * weights and {v.dtype.name for v in opt} == {"bfloat16"}
    first = load_trained(run / "checkpoints" / "0")[1]["transformer"]
    assert any(
        not np.array_equal(v, first[k]) for k, v in load_trained(run)[1]["transformer"].items()
    )


@pytest.mark.slow
def test_without_space_for_the_next_checkpoint_no_epoch_is_computed(alike, tmp_path, monkeypatch):
    run = shutil.copytree(alike, tmp_path / "run")
    usage = shutil.disk_usage(run)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"the next checkpoint needs .* MB, the disk has 0\.0 MB"):
        train_tiny(alike.parent / "recipe.py", f"run_dir={run}", "epochs=3")
    monkeypatch.undo()
    assert [record["epoch"] for record in run_log.read_metrics(run)] == [1, 2] and newest(run) == 2


@pytest.mark.slow
def test_a_continued_run_holds_no_more_than_a_new_one(recipe, monkeypatch):
    """Arrays of the weights' shapes at its first update: those before training are not kept. Neither
    the base weights are read nor a fresh state is made.
    """
    config, run = recipe
    update_epoch, held = training.update_epoch, []

    def live():
        gc.collect()
        buffers = {
            x.addressable_data(0).unsafe_buffer_pointer(): x.shape for x in jax.live_arrays()
        }
        return collections.Counter(buffers.values())

    def measured(session, states, *args):
        shapes = {x.shape for x in states["transformer"].trainable.values() if x.ndim > 1}
        held.append({shape: count for shape, count in (live() - before).items() if shape in shapes})
        return update_epoch(session, states, *args)

    monkeypatch.setattr(training, "update_epoch", measured)
    settings = "lora.rank=0", "train.learning_rate=1e-5", "train.kl_weight=0"
    for folder, epochs in ((f"{run}_first", 1), (run, 1), (run, 2)):  # the first fills caches
        before = live()
        if epochs == 2:
            for unneeded in ("load_weights", "init_state", "make_policy"):
                monkeypatch.setattr(setup, unneeded, None)
        train_tiny(config, *settings, f"run_dir={folder}", f"epochs={epochs}")
    _, new, continued = held
    assert continued == new and len(new) > 5


@pytest.mark.slow
def test_starts_from_a_lora_file(alike, model, recipe, capsys):
    """Another run's adapters through a LoRA file: the weights that run ended with, to the bit, at
    epoch 0.
    """
    config, run = recipe
    (path,) = export(alike, model, config.parent / "lora.safetensors", "comfyui").values()
    train_tiny(config, f"lora.init={path}", "epochs=1")
    wanted, first = (
        load_trained(folder)[1]["transformer"] for folder in (alike, run / "checkpoints" / "0")
    )
    assert first.keys() == wanted.keys() and all(
        np.array_equal(first[k], wanted[k]) for k in wanted
    )
    assert any(np.abs(v).max() > 0 for k, v in wanted.items() if k.endswith("lora_b"))
    assert any(
        not np.array_equal(v, wanted[k]) for k, v in load_trained(run)[1]["transformer"].items()
    )
    away = path.rename(path.with_name("away.safetensors"))  # a continued run does not read it
    train_tiny(config, f"lora.init={path}", "epochs=2")
    away.rename(path)
    assert "continuing" in capsys.readouterr().out and newest(run) == 2
    with pytest.raises(UserError, match=r"has rank 4.*lora\.rank=2 is too low"):
        train_tiny(config, f"lora.init={path}", "lora.rank=2", f"run_dir={run}2")
    assert not pathlib.Path(f"{run}2").exists()


@pytest.mark.slow
def test_workers_score_the_same(alike, recipe):
    config, run = recipe
    train_tiny(config, "reward.workers=2", "epochs=2")
    assert_same(result(run), result(alike))


@pytest.mark.slow
def test_servers_score_the_same_and_one_may_die(alike, recipe, monkeypatch, capsys, caplog):
    pytest.importorskip("fastapi")
    config, run = recipe
    monkeypatch.setenv("REWARD_TOKEN", TOKEN)
    print_once = training.print_once
    with Command("--workers=1") as one, Command("--workers=1") as other:

        def kill_one(*lines, **kwargs):
            if str(lines[0]).startswith("epoch 1/"):
                one.kill()
            print_once(*lines, **kwargs)

        monkeypatch.setattr(training, "print_once", kill_one)
        train_tiny(
            config, f"reward.servers={(one.url(), other.url())!r}", "reward.workers=2", "epochs=2"
        )
        assert one.process.poll() is not None and other.process.poll() is None
    assert "is not used for now" in caplog.text
    assert TOKEN not in "".join(
        (*capsys.readouterr(), caplog.text, (run / "config.json").read_text())
    )
    assert_same(result(run), result(alike))


SPLIT = (
    "sample.steps=4",
    "sample.sde_steps=3",
    "sample.sde_range=(0,4)",
    "sample.guidance=2.0",
    "eval.steps=4",
    "epochs=2",
)


@pytest.fixture(scope="module")
def two_experts_run(two_experts, tmp_path_factory):
    """A run that trains both, undisturbed."""
    root = tmp_path_factory.mktemp("two_experts_run")
    config, run = write_recipe(two_experts, root)
    train_tiny(config, *SPLIT)
    return run


@pytest.mark.slow
def test_both_experts_learn_in_every_epoch(two_experts_run):
    metrics, _ = records_of(two_experts_run)
    assert [record["epoch"] for record in metrics] == [1, 2]
    for record in metrics:
        for name in ("transformer", "transformer_2"):
            expert = record["experts"][name]
            assert (
                expert["ratio_max_error"] <= 1e-5
                and expert["grad_norm"] > 0
                and expert["updates"] == 2
            )
    _, trained, meta = load_trained(two_experts_run)
    assert meta["experts"] == ["transformer", "transformer_2"]
    for name in trained:
        assert all(np.abs(v).max() > 0 for k, v in trained[name].items() if k.endswith("lora_b")), (
            name
        )
    one, other = (trained[name]["blocks/attn1/to_q/lora_a"] for name in trained)
    assert not np.array_equal(one, other)


@pytest.mark.slow
def test_two_experts_resume_bit_for_bit_with_the_idle_one_offloaded(
    two_experts, two_experts_run, tmp_path, capsys
):
    config, run = write_recipe(two_experts, tmp_path)
    stage = multihost.stage

    class Killed(BaseException):
        pass

    def killed(name):
        if name == "epoch 2: update":
            raise Killed
        stage(name)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(multihost, "stage", killed)
        train_tiny(config, *SPLIT, "model.offload=always")
    assert newest(run) == 1
    train_tiny(config, *SPLIT, "model.offload=always")
    assert "is offloaded to host memory" in (out := capsys.readouterr().out) and "continuing" in out
    assert_same(result(run), result(two_experts_run))


@pytest.mark.slow
def test_one_expert_of_two(two_experts, tmp_path):
    config, run = write_recipe(two_experts, tmp_path)
    train_tiny(config, *SPLIT, "sample.sde_steps=1", 'train.experts=("transformer_2",)', "epochs=1")
    _, trained, _ = load_trained(run)
    assert list(trained) == ["transformer_2"]


def test_a_schedule_without_a_step_for_a_trained_expert_is_refused(two_experts, tmp_path):
    config, run = write_recipe(two_experts, tmp_path)
    with pytest.raises(
        UserError, match=r"transformer would be trained without a step.*sample\.shift"
    ):
        train_tiny(config, "sample.steps=4", "sample.sde_steps=2", "sample.sde_range=(2,4)")
    assert not run.exists()


@pytest.mark.slow
def test_divergence_stops_and_names_the_last_good_checkpoint(recipe):
    config, run = recipe
    with pytest.raises(UserError, match=r"(?s)not finite.*learning_rate") as error:
        train_tiny(config, "lora.alpha=1e38", "epochs=9")
    named = re.search(r"last good checkpoint is (\S+)\. ", str(error.value))[1]
    assert pathlib.Path(named) == run.absolute() / "checkpoints" / str(newest(run))
    assert all(np.isfinite(v).all() for v in arrays_of(run).values())


@pytest.mark.slow
def test_a_budget_ends_the_run_as_its_last_epoch_would(alike, tmp_path, capsys):
    """24 evaluations an epoch, 8 videos of 3 steps, 2 epochs behind it: 60 are reached in the
    third.
    """
    run = shutil.copytree(alike, tmp_path / "run")
    train_tiny(
        alike.parent / "recipe.py",
        f"run_dir={run}",
        "budget.evaluations=60",
        "epochs=9",
        "save.every=9",
    )
    assert "epoch 3/9" in (out := capsys.readouterr().out) and "epoch 4/9" not in out
    metrics, evaluations = records_of(run)
    assert [r["spent_evaluations"] for r in metrics] == [24, 48, 72] and newest(run) == 3
    assert [r["epoch"] for r in evaluations] == [0, 2, 3]
    seconds = [r["spent_seconds"] for r in run_log.read_metrics(run)]
    assert 0 < seconds[0] and all(np.diff(seconds) > 0)
    spent = train_state.spent_by(Checkpoints(run), 3)
    assert spent == Spent(72, seconds[-1])
    assert (
        Budget(72).reached(spent)
        and not Budget(73).reached(spent)
        and Budget(None, seconds[-1]).reached(spent)
    )
    assert "is not finished" not in (run / "report.html").read_text()

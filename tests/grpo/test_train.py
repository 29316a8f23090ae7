"""`python -m grpo.train` as its user runs it: whole runs, runs that are killed at any moment, and
bad input.

Runs whose process is not the subject are made in this one (`tests/grpo/here.py`). They are compared
with the run `alike`, and runs in processes of their own with the run `whole`: only runs of the same
kind are equal to the bit.
"""

import contextlib
import datetime
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest

from convert import to_diffusers
from convert.export_lora import export
from grpo import train as training
from grpo.learning import train_state
from grpo.records import run_log
from grpo.settings.budget import Budget, Spent
from tests import commands
from tests.grpo.here import train_here
from tests.grpo.tiny_run import (
    MEASURES,
    PICTURE,
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


def launch(config, *overrides, command=commands.command, **kwargs):
    """`overrides`: 'key=value' of the config; command: or `commands.fresh`."""
    settings = (f"--config.{o}" for o in (*MEASURES, *PICTURE, *overrides))
    return subprocess.Popen(
        command("grpo.train", f"--config={config}", *settings),
        env=commands.environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **kwargs,
    )


def train(config, *overrides, **kwargs):
    """(exit code, standard output, standard error) of a whole run."""
    process = launch(config, *overrides, **kwargs)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def kill_when(config, event, *overrides):
    """Starts a run and SIGKILLs it as soon as `event(output so far)`; returns the output."""
    process, out = launch(config, *overrides), ""
    os.set_blocking(process.stdout.fileno(), False)
    try:
        deadline = time.time() + 240
        while not event(out):
            assert time.time() < deadline and process.poll() is None, out + process.stderr.read()
            with contextlib.suppress(BlockingIOError):
                out += os.read(process.stdout.fileno(), 65536).decode()
            time.sleep(0.001)
    finally:
        os.kill(commands.process_id(process), signal.SIGKILL)  # itself, so that it is over at once
        process.communicate()
    return out


def here(config, *overrides):
    """A whole run in this process; returns what `grpo.train.train_recipe` does."""
    return train_here(config, *MEASURES, *PICTURE, *overrides)


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """A run that nothing disturbed: (its folder, its output)."""
    root = tmp_path_factory.mktemp("whole")
    config, run = write_recipe(model, root)
    code, out, err = train(config)
    assert code == 0, out + err
    return config, run, out


@pytest.fixture(scope="module")
def alike(model, tmp_path_factory):
    """Two epochs in this process, undisturbed: the folder."""
    config, run = write_recipe(model, tmp_path_factory.mktemp("alike"))
    here(config, "epochs=2")
    return run


@pytest.mark.slow
def test_evaluation_of_a_checkpoint_repeats_the_runs_own(whole, tmp_path):
    """`python -m grpo.evaluate`: the base as epoch 0 saw it, the checkpoint as the last evaluation
    did.
    """
    config, run, _ = whole
    env = commands.environment()
    command = commands.command(
        "grpo.evaluate",
        f"--config={config}",
        f"--checkpoint={run}",
        *(f"--config.{o}" for o in PICTURE),
    )
    done = subprocess.run(
        [*command, f"--out={tmp_path / 'out'}"], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0 and "report.html" in done.stdout, done.stdout + done.stderr
    ours, theirs = (run_log.read_evaluations(folder) for folder in (tmp_path / "out", run))
    assert [r["epoch"] for r in ours] == [0, 3] and (tmp_path / "out" / "report.html").is_file()
    assert len(list((tmp_path / "out" / "side_by_side").iterdir())) == 2
    for record in ours:
        same = next(r for r in theirs if r["epoch"] == record["epoch"])
        assert record["prompts"] == same["prompts"] and record["texts"] == same["texts"]
        np.testing.assert_allclose(record["rewards"], same["rewards"], atol=1e-6)
    refused = subprocess.run([*command, f"--out={run}"], capture_output=True, text=True, env=env)
    assert refused.returncode == 1 and "is a training run's folder" in refused.stderr


def test_whole_run(whole):
    _, run, out = whole
    assert re.search(r"epoch 0: held-out OCR reward \d\.\d+ \[", out)
    assert "memory of a device" in out and "compiled again" not in out
    assert re.search(
        r"about \d+ (s|min) or less, by the first evaluation", out.split("epoch 1/3")[0]
    )
    assert "epoch 3/3: reward" in out and "report.html" in out.splitlines()[-1]
    last, arrays, (metrics, evaluations) = result(run)
    assert last == 3
    assert [r["epoch"] for r in metrics] == [1, 2, 3]
    assert [r["epoch"] for r in evaluations] == [0, 2, 3]
    for record in metrics:
        assert record["ratio_max_error"] <= 1e-5
        assert record["grad_norm"] > 0
    adapters = {k: v for k, v in arrays.items() if k.startswith("trained") and "lora_b" in k}
    assert adapters and all(np.abs(v).max() > 0 for v in adapters.values())
    lines = (run / "run.log").read_text().splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == out.splitlines()
    assert all(datetime.datetime.fromisoformat(line.split(" ", 1)[0]).tzinfo for line in lines)
    assert lines[0].endswith("at once") and "Ctrl-C once" in lines[0]
    assert all(len(line) <= 100 for line in out.splitlines() if line.startswith("epoch"))
    assert "ETA" in out
    (entry,) = run_log.read_starts(run)
    assert entry["epoch"] == 0 and entry["in_force"]["train.kl_weight"] == 0.004
    saved = json.loads((run / "config.json").read_text())
    assert saved["lora"]["rank"] == 4 and saved["command"].startswith("python -m grpo.train")
    html = (run / "report.html").read_text()
    assert "tide" in html and "data:image/png;base64," in html
    assert not re.search(r'(src|href)="(?!data:|#)', html)


def test_same_command_again_changes_nothing(whole, capsys):
    config, run, _ = whole
    before = result(run)
    here(config)
    assert "report.html" in (out := capsys.readouterr().out) and "epoch 3/3" not in out
    assert_same(result(run), before)


@pytest.mark.slow
def test_a_continued_run_may_change_its_learning_rate(alike, tmp_path, capsys):
    """The change is printed and recorded, also those of earlier starts; the way back leaves none."""
    run = tmp_path / "run"
    shutil.copytree(alike, run)
    config = alike.parent / "recipe.py"

    def changes(epochs, rate):
        here(config, f"run_dir={run}", f"epochs={epochs}", f"train.learning_rate={rate}")
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
def test_killed_again_and_again_continues_bit_for_bit(whole, recipe):
    """Before the first epoch is saved, and in the save of a later one, whose figures are logged
    already; then the run ends as if nothing had been.
    """
    config, run = recipe
    folder = run / "checkpoints"

    def temporary():
        return [p.name for p in folder.iterdir() if "tmp" in p.name]

    kill_when(config, lambda out: "epoch 0: held-out" in out)
    # a checkpoint that is not the first is being written: its temporary folder is there
    for _ in range(5):
        kill_when(config, lambda out: (folder / "1").is_dir() and temporary())
        if temporary():
            break
    assert temporary(), "no kill hit a save"
    assert newest(run) < 3
    code, out, err = train(config, command=commands.fresh)  # with another seed of Python's hashes
    assert code == 0 and "continuing" in out, out + err
    assert_same(result(run), result(whole[1]))
    assert not temporary()


def signalled(config, number, after, *overrides, times=1):
    """(exit code, standard output, standard error) of a run that gets the signal `number` after a
    line's beginning, so many times.
    """
    process = launch(config, *overrides)
    for line in process.stdout:
        if line.startswith(after):
            break
    for _ in range(times):
        process.send_signal(number)
        time.sleep(0.05)  # two signals at once are one
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


@pytest.mark.slow
def test_ctrl_c_twice_stops_with_one_line(recipe):
    config, run = recipe
    code, _, err = signalled(config, signal.SIGINT, "epoch 2/", "epochs=1000", times=2)
    assert code == 130, err
    assert "the same command continues" in err and "Traceback" not in err
    assert newest(run) >= 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "number, code, name", [(signal.SIGTERM, 143, "SIGTERM"), (signal.SIGINT, 130, "Ctrl-C")]
)
def test_a_signal_saves_the_epoch_first(recipe, number, code, name):
    """Of a run that would have saved at its end only; how such runs continue:
    tests/grpo/test_hosts.py.
    """
    config, run = recipe
    ended, out, err = signalled(config, number, "epoch 0:", "epochs=1000", "save.every=1000")
    assert ended == code and "report" in out and "Traceback" not in err, out + err
    assert (
        1 <= newest(run) < 1000
        and f"ended by {name} after epoch {newest(run)}, which is saved" in err
    )
    assert f"ended by {name} after" in (run / "run.log").read_text().splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.3, 3.0])
def test_ctrl_c_while_starting(recipe, seconds):
    config, _ = recipe
    process = launch(config, command=commands.fresh)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "stopped" in err and "Traceback" not in err, err


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
    here(config, "epochs=2", "eval.every=1")
    assert found == [(False, [0]), (False, [0, 1]), (True, [0, 1, 2])] and newest(run) == 2
    assert capsys.readouterr().out.count("warning: the report was not written") == 1
    assert "after 2 epochs: the run is finished" in (run / "report.html").read_text()
    assert "ZeroDivisionError" in (run / "run.log").read_text()


def test_files_can_be_read_by_others(whole, model, tmp_path):
    """All that a run and the commands after it write has the permissions of new files: 0644 by the usual
    umask, which libraries that make temporary files do not ask for.
    """
    _, run, _ = whole
    export(run, model, tmp_path / "lora")
    export(run, model, tmp_path / "peft", "peft")
    to_diffusers.export(model, tmp_path / "diffusers", checkpoint=str(run))
    (tmp_path / "new").touch()
    allowed = (tmp_path / "new").stat().st_mode
    written = [p for root in (run, pathlib.Path(model), tmp_path) for p in root.rglob("*")]
    files = [path for path in written if path.is_file()]
    names = {path.name for path in files}
    assert names >= {"report.html", "README.md", "reward.png", "adapter_config.json", "run.log"}
    assert names >= {"wan_jax.json", "model_index.json", "pytorch_lora_weights.safetensors"}
    assert [str(path) for path in files if path.stat().st_mode & allowed != allowed] == []


@pytest.mark.slow
def test_full_fine_tuning(recipe):
    config, run = recipe
    here(config, "lora.rank=0", "epochs=2", "train.learning_rate=1e-5")
    arrays, (metrics, _) = arrays_of(run), records_of(run)
    assert any(k.startswith("trained") and "patch_embed" in k for k in arrays)
    assert not any("lora" in k for k in arrays)
    assert all(r["ratio_max_error"] <= 1e-5 for r in metrics)


@pytest.mark.slow
def test_starts_from_a_lora_file(alike, model, recipe, capsys):
    """Another run's adapters through a LoRA file: the weights that run ended with, to the bit, at
    epoch 0.
    """
    config, run = recipe
    (path,) = export(alike, model, config.parent / "lora.safetensors", "comfyui").values()
    here(config, f"lora.init={path}", "epochs=1")
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
    here(config, f"lora.init={path}", "epochs=2")
    assert "continuing" in capsys.readouterr().out and newest(run) == 2
    with pytest.raises(UserError, match=r"has rank 4.*lora\.rank=2 is too low"):
        here(config, f"lora.init={path}", "lora.rank=2", f"run_dir={run}2")
    assert not pathlib.Path(f"{run}2").exists()


@pytest.mark.slow
def test_workers_score_the_same(alike, recipe):
    config, run = recipe
    here(config, "reward.workers=2", "epochs=2")
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
        here(config, f"reward.servers={(one.url(), other.url())!r}", "reward.workers=2", "epochs=2")
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
    here(config, *SPLIT)
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
        here(config, *SPLIT, "model.offload=always")
    assert newest(run) == 1
    here(config, *SPLIT, "model.offload=always")
    assert "is offloaded to host memory" in (out := capsys.readouterr().out) and "continuing" in out
    assert_same(result(run), result(two_experts_run))


@pytest.mark.slow
def test_one_expert_of_two(two_experts, tmp_path):
    config, run = write_recipe(two_experts, tmp_path)
    here(config, *SPLIT, "sample.sde_steps=1", 'train.experts=("transformer_2",)', "epochs=1")
    _, trained, _ = load_trained(run)
    assert list(trained) == ["transformer_2"]


def test_a_schedule_without_a_step_for_a_trained_expert_is_refused(two_experts, tmp_path):
    config, run = write_recipe(two_experts, tmp_path)
    with pytest.raises(
        UserError, match=r"transformer would be trained without a step.*sample\.shift"
    ):
        here(config, "sample.steps=4", "sample.sde_steps=2", "sample.sde_range=(2,4)")
    assert not run.exists()


def test_other_settings_are_refused(whole):
    config, run, _ = whole
    before = result(run)
    with pytest.raises(UserError, match=r"(?s)train\.adam_b1: 0\.9 -> 0\.5.*--config\.run_dir"):
        here(config, "train.adam_b1=0.5", "epochs=6")
    assert_same(result(run), before)


@pytest.mark.slow
def test_divergence_stops_and_names_the_last_good_checkpoint(recipe):
    config, run = recipe
    with pytest.raises(UserError, match=r"(?s)not finite.*learning_rate") as error:
        here(config, "lora.alpha=1e38", "epochs=9")
    named = re.search(r"last good checkpoint is (\S+)\. ", str(error.value))[1]
    assert pathlib.Path(named) == run.absolute() / "checkpoints" / str(newest(run))
    assert all(np.isfinite(v).all() for v in arrays_of(run).values())


def test_bad_prompts_are_named_by_line(recipe):
    config, run = recipe
    prompts = config.parent / "train.txt"
    prompts.write_text('A sign that says "open".\nA sign that says nothing.\n\nAnother one.\n')
    code, _, err = train(config)
    assert code == 1 and "Traceback" not in err
    assert "train.txt: 2 of 4 lines" in err and "line 2: " in err and "line 4: " in err
    assert not run.exists()


@pytest.mark.parametrize(
    "override, message",
    [
        ("sample.frames=4", "frames"),
        ("sample.height=50", "50"),
        ("model.path=/nowhere", "convert.from_diffusers"),
        ("prompts.train=/nowhere.txt", "/nowhere.txt does not exist"),
        ("lora.init=/nowhere.safetensors", "/nowhere.safetensors does not exist"),
        ("train.learning_rat=1", "learning_rate"),
        ("sample.groups=100", "100"),
    ],
)
def test_bad_input_is_one_message(recipe, override, message):
    config, run = recipe
    code, _, err = train(config, override)
    assert code == 1 and "Traceback" not in err and message in err, err
    assert len(err.strip().splitlines()) <= 6, err
    assert not run.exists()


def test_run_folder_that_cannot_be_written(recipe):
    config, run = recipe
    run.write_text("a file where the folder should be")
    code, _, err = train(config)
    assert code == 1 and "Traceback" not in err and str(run) in err, err
    assert run.read_text() == "a file where the folder should be"


@pytest.mark.slow
def test_a_run_whose_folder_is_moved_away_while_it_compiles_makes_no_new_one(recipe):
    config, run = recipe
    process = launch(config)
    for line in process.stdout:
        if line.startswith("rematerialisation"):
            run.rename(f"{run}.moved")
            break
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1 and "Traceback" not in err and f"{run} was moved" in err, err
    assert not run.exists()


@pytest.mark.slow
def test_a_budget_ends_the_run_as_its_last_epoch_would(alike, tmp_path, capsys):
    """24 evaluations an epoch, 8 videos of 3 steps, 2 epochs behind it: 60 are reached in the
    third.
    """
    run = shutil.copytree(alike, tmp_path / "run")
    here(
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

"""Rewards that raise, hang, die or return NaN, and videos that are not finite: a run goes on, or
stops with one message and its last epoch saved.
"""

import functools
import json
import math

import jax
import jax.numpy as jnp
import pytest

from grpo import sampling, setup, train
from grpo.data.prompts import load_prompts
from grpo.records import run_log
from grpo.report import run_report
from grpo.report.run_report import write_report
from grpo.rollout import initial_noise
from grpo.run import RunSpec
from grpo.scoring import heldout
from grpo.settings import parse
from rewards.ocr.targets import parse_targets
from rewards.pool import RewardPool
from tests.grpo import faulty, here
from tests.grpo.tiny_run import assert_same, config_of, newest, records_of, result, write_recipe
from wan_jax.command_line import cli
from wan_jax.command_line.cli import UserError
from wan_jax.distributed import multihost
from wan_jax.models import presets
from wan_jax.storage import model_dir

KINDS = ("raises", "nan", "hangs", "dies")
VIDEOS = 4  # an epoch's, and prompts of an evaluation
SMALL = {
    "epochs": 2,
    "eval.every": 1,
    "save.every": 9,
    "sample.group_size": 2,
    "train.updates_per_epoch": 1,
    "sample.batch_size": VIDEOS,
    "eval.num_prompts": VIDEOS,
    "eval.previews": 1,
}
NEVER = ("raises", "never", False)
stage, make_policy = multihost.stage, setup.make_policy
shared = {}  # of all runs here: what neither rewards nor folders enter
pytestmark = pytest.mark.slow


@pytest.fixture
def run_with(model, tmp_path, monkeypatch):
    """A function: run_with(reward, (kind, when, once), **settings) trains, and returns the run's
    folder, without a report. All runs share their compiled functions and the policy they start from.
    """
    return runner(model, tmp_path, monkeypatch)


def runner(model, folder, patch):
    """Return what `run_with` is, for a folder."""
    here.share(patch)
    patch.setattr(setup, "make_policy", fresh_policy)
    patch.setattr(train.run_report, "write_report", lambda folder: folder / "report.html")

    def phase(name):
        faulty.enter(folder, name)
        stage(name)

    patch.setattr(multihost, "stage", phase)
    opened = model_dir.open_model(model)

    def run(reward, fault, workers=0, **values):
        path, run_folder = write_recipe(model, folder)
        recipe = parse.recipe_from_config(config_of(path.read_text(), **SMALL | values))
        sets = recipe.prompts.train, recipe.prompts.heldout
        prompts = [load_prompts(path, parse_targets) for path in sets]
        spec = RunSpec.make(recipe, parse.settings_of(recipe), presets.of_folder(opened))
        made = functools.partial(reward, str(folder), *fault)
        with RewardPool(made, workers, timeout=1.5) as pool:
            train.train(spec, opened, *prompts, pool)
        return run_folder

    return run


def fresh_policy(*args, **kwargs):
    """`make_policy`, whose arrays the first update takes."""
    if "policy" not in shared:
        shared["policy"] = make_policy(*args, **kwargs)
    policy, trainable = shared["policy"]
    return policy, jax.tree.map(jnp.copy, trainable)


def pool_size(kind, workers=1):
    """Processes of their own for what would take the trainer along."""
    return workers if kind in ("hangs", "dies") else 0


@pytest.fixture(scope="module")
def undisturbed(model, tmp_path_factory):
    """What a run without faults computes: (newest epoch, arrays, records)."""
    with pytest.MonkeyPatch.context() as patch:
        run = runner(model, tmp_path_factory.mktemp("undisturbed"), patch)
        return result(run(faulty.alone, NEVER))


@pytest.mark.parametrize("kind", KINDS)
def test_one_video_without_a_score(run_with, kind, capsys, caplog):
    metrics, evaluations = records_of(
        run_with(faulty.alone, (kind, "epoch 1", True), pool_size(kind, 2))
    )
    assert [m["failed_scores"] for m in metrics] == [1, 0] and metrics[0]["retried_scores"] == 1
    assert [e["num"] for e in evaluations] == [VIDEOS] * 3
    assert "1 scores failed" in capsys.readouterr().out and len(caplog.records) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_without_scores_keeps_the_epochs_before(run_with, undisturbed, kind, tmp_path):
    """Although the run would have saved at its end only. Mended, it ends as if nothing had been."""
    cause = {
        "raises": "ValueError: the scorer is broken",
        "nan": "not finite",
        "hangs": "took longer than 1.5 s",
        "dies": "died with exit code 3",
    }[kind]
    with pytest.raises(
        UserError, match=rf"epoch 2: not one of {VIDEOS} videos .*{cause}.*Epoch 1 is saved"
    ):
        run_with(faulty.alone, (kind, "epoch 2", False), pool_size(kind))
    assert newest(tmp_path / "run") == 1
    if kind == "raises":
        assert_same(result(run_with(faulty.alone, NEVER)), undisturbed)


@pytest.mark.parametrize("kind", ["raises", "dies"])
def test_an_evaluation_without_scores_is_empty_and_the_run_goes_on(
    run_with, undisturbed, kind, capsys
):
    """Its record has null, in strict JSON. The tests above tell all kinds of missing scores apart."""
    folder = run_with(faulty.alone, (kind, "evaluation after epoch 1", False), pool_size(kind))
    last, arrays, (metrics, evaluations) = result(folder)
    json.loads((folder / "evals.jsonl").read_text().splitlines()[1], parse_constant=pytest.fail)
    empty = evaluations.pop(1)
    assert empty["reward"] is empty["low"] is empty["high"] is None and (
        empty["num"],
        empty["failed_scores"],
    ) == (0, 4)
    wanted = undisturbed[2][1]
    assert_same(
        (last, arrays, [metrics, evaluations]),
        (*undisturbed[:2], [undisturbed[2][0], [wanted[0], wanted[2]]]),
    )
    out = capsys.readouterr().out
    assert (
        "warning: the evaluation after epoch 1 has no result: 0 of 4" in out and "epoch 2/2" in out
    )
    assert "no result of the evaluation after epoch 1" in "".join(run_report.summary_lines(folder))
    if kind == "raises":
        assert "no result of the evaluation after epoch 1" in write_report(folder).read_text()


@pytest.mark.parametrize("kind", ["raises", "nan", "dies"])
def test_a_measure_of_weight_0_that_fails_is_counted(run_with, kind, capsys):
    """It costs no video, not even where it ends its worker. One that hangs is ended with its
    worker, like all videos of the tests above.
    """
    metrics, _ = records_of(
        run_with(
            faulty.beside,
            (kind, "epoch 1", False),
            pool_size(kind),
            **{"reward.weights.sharpness": 0.0},
        )
    )
    assert [m["failed_scores"] for m in metrics] == [0, 0]
    assert [m["failed_rewards"] for m in metrics] == [{"sharpness": VIDEOS}, {"sharpness": 0}]
    assert [m["rewards"]["sharpness"] is None for m in metrics] == [True, False]
    tried = metrics[0]["retried_rewards"]["sharpness"], metrics[0]["retried_scores"]
    assert tried == ((0, VIDEOS) if pool_size(kind) else (VIDEOS, 0))
    assert f"sharpness failed for {VIDEOS}" in capsys.readouterr().out


@pytest.mark.parametrize("kind, once", [("raises", True), ("raises", False), ("dies", False)])
def test_a_weighted_measure_that_fails_masks_the_video(run_with, kind, once, caplog):
    fault = kind, "epoch 2", once
    if once:
        metrics, _ = records_of(
            run_with(faulty.beside, fault, pool_size(kind), **{"reward.weights.sharpness": 0.5})
        )
        assert [m["failed_scores"] for m in metrics] == [0, 1] and metrics[1]["failed_rewards"] == {
            "sharpness": 1
        }
        assert "the scorer is broken" in caplog.text and len(caplog.records) == 1
        return
    with pytest.raises(UserError, match=r"epoch 2: not one of .*sharpness: .*Epoch 1 is saved"):
        run_with(faulty.beside, fault, pool_size(kind), **{"reward.weights.sharpness": 0.5})


def test_without_the_base_models_measures_no_epoch_begins(run_with, tmp_path):
    """The same command makes the first evaluation again, and goes on."""
    weights = {"reward.weights.sharpness": 0.5}
    with pytest.raises(
        UserError, match=r"epoch 0: .*sharpness for fewer than two .*the scorer is broken"
    ):
        run_with(faulty.beside, ("raises", "evaluation after epoch 0", False), **weights)
    assert not run_log.read_metrics(tmp_path / "run") and not run_log.read_evaluations(
        tmp_path / "run"
    )
    metrics, evaluations = records_of(run_with(faulty.beside, NEVER, **weights))
    assert [e["epoch"] for e in evaluations] == [0, 1, 2] and [
        m["failed_scores"] for m in metrics
    ] == [0, 0]


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_an_evaluation_that_is_cut_off_is_made_when_the_run_goes_on(
    run_with, undisturbed, epoch, monkeypatch
):
    saving = {"save.every": 1}

    class Killed(BaseException):
        pass

    def killed(self, arrays, number, *args):
        if number == epoch:
            raise Killed
        return evaluate(self, arrays, number, *args)

    evaluate = setup.Evaluator.__call__
    with monkeypatch.context() as patch:
        patch.setattr(setup.Evaluator, "__call__", killed)
        with pytest.raises(Killed):
            run_with(faulty.alone, NEVER, **saving)
    assert_same(result(run_with(faulty.alone, NEVER, **saving)), undisturbed)


@pytest.mark.parametrize(
    "when, evaluated", [("epoch 1", [0]), ("evaluation after epoch 1", [0, 1])]
)
def test_sigterm_saves_before_and_after_an_evaluation(
    run_with, undisturbed, when, evaluated, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        phase = multihost.stage
        patch.setattr(
            multihost,
            "stage",
            lambda name: (phase(name), name.startswith(when) and cli.asked_to_end.set()),
        )
        folder = run_with(faulty.alone, NEVER)
    assert newest(folder) == 1
    assert [e["epoch"] for e in run_log.read_evaluations(folder)] == evaluated
    assert_same(result(run_with(faulty.alone, NEVER)), undisturbed)


def spoilt(rows):
    """`initial_noise` with NaN in the samples of these numbers."""

    def noise(key, samples, shape):
        x = initial_noise(key, samples, shape)
        return jnp.where(jnp.isin(samples, jnp.asarray(rows)).reshape(-1, 1, 1, 1, 1), jnp.nan, x)

    return noise


def test_videos_that_are_not_finite_are_masked_and_counted(run_with, monkeypatch, capsys):
    monkeypatch.setattr(sampling, "initial_noise", spoilt([1]))
    monkeypatch.setattr(heldout, "initial_noise", spoilt([0, 2]))
    folder = run_with(faulty.alone, NEVER)
    metrics, evaluations = records_of(folder)
    for m in metrics:
        assert (m["nonfinite_videos"], m["failed_scores"]) == (1, 1)
        assert (
            m["grad_norm"] > 0 and m["ratio_max_error"] <= 1e-5 and math.isfinite(m["reward_mean"])
        )
    for e in evaluations:
        assert (e["nonfinite_videos"], e["failed_scores"], e["num"]) == (2, 2, 2) and e["rewards"][
            0
        ] is None
    out = capsys.readouterr().out
    assert (
        "1 videos not finite" in out
        and "2 videos not finite" in out
        and "compiled again" not in out
    )


def test_a_model_that_makes_only_nan_stops_the_run(run_with, monkeypatch):
    monkeypatch.setattr(sampling, "initial_noise", spoilt(range(VIDEOS)))
    with pytest.raises(
        UserError,
        match=rf"epoch 1: not one of .*{VIDEOS} of {VIDEOS} videos are not finite.*damaged",
    ):
        run_with(faulty.alone, NEVER)

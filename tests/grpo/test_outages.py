"""Rewards that raise, hang, die or return NaN, and videos that are not finite: a run goes on, or
stops with one message and its last epoch saved.
"""

import functools
import json
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grpo.learner import Learner

from convert.from_diffusers import convert
from grpo import learner, train
from grpo.data.prompts import load_prompts
from grpo.records import run_log
from grpo.report import run_report
from grpo.report.run_report import write_report
from grpo.rollout import Trajectory, initial_noise
from grpo.scoring import heldout
from grpo.settings import parse
from rewards.ocr.targets import parse_targets
from rewards.pool import RewardPool
from tests import tiny
from tests.grpo import faulty, here, test_train
from wan_jax.command_line import cli
from wan_jax.command_line.cli import UserError
from wan_jax.distributed import mesh as mesh_lib

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
stage, make_policy = train.hosts.stage, train.make_policy
shared = {}  # of all runs here: what neither rewards nor folders enter


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    root = tmp_path_factory.mktemp("outages")
    convert(str(tiny.write_pipeline(root / "source", seed=3)), root / "model", "float32")
    return root / "model"


@pytest.fixture
def start(model, tmp_path, monkeypatch):
    """start(reward, (kind, when, once), **settings): trains, and returns the run's folder, without
    a report. All runs share their compiled functions and the policy they start from.
    """
    here.share(monkeypatch)
    monkeypatch.setattr(train, "make_policy", fresh_policy)
    monkeypatch.setattr(train.report, "write_report", lambda folder: folder / "report.html")

    def phase(name):
        faulty.enter(tmp_path, name)
        stage(name)

    monkeypatch.setattr(train.hosts, "stage", phase)

    def make(reward, fault, workers=0, **overrides):
        path, folder = test_train.recipe.__wrapped__(model, tmp_path)
        namespace = {}
        exec(path.read_text(), namespace)
        c = namespace["get_config"]()
        c.update_from_flattened_dict(SMALL | overrides)
        s = parse.from_config(c)
        prompts = [load_prompts(p, parse_targets) for p in (c.prompts.train, c.prompts.heldout)]
        with RewardPool(
            functools.partial(reward, str(tmp_path), *fault), workers, timeout=1.5
        ) as pool:
            train.train(c, s, train.Plan.make(c, s), *prompts, pool)
        return folder

    return make


def fresh_policy(*args, **kwargs):
    """`make_policy`, whose arrays the first update takes."""
    if "policy" not in shared:
        shared["policy"] = make_policy(*args, **kwargs)
    policy, trainable = shared["policy"]
    return policy, jax.tree.map(jnp.copy, trainable)


def pool_size(kind):
    """Processes of their own for what would take the trainer along."""
    return 2 if kind in ("hangs", "dies") else 0


def records(folder):
    return test_train.records_of(folder)


@pytest.fixture(scope="module")
def undisturbed(model, tmp_path_factory):
    """What a run without faults computes: (newest epoch, arrays, records)."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        run = start.__wrapped__(model, tmp_path_factory.mktemp("undisturbed"), monkeypatch)
        return test_train.result(run(faulty.alone, NEVER))


@pytest.mark.parametrize("kind", KINDS)
def test_one_video_without_a_score(start, kind, capsys, caplog):
    metrics, evaluations = records(start(faulty.alone, (kind, "epoch 1", True), pool_size(kind)))
    assert [m["failed_scores"] for m in metrics] == [1, 0] and metrics[0]["retried_scores"] == 1
    assert [e["num"] for e in evaluations] == [VIDEOS] * 3
    assert "1 scores failed" in capsys.readouterr().out and len(caplog.records) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_without_scores_keeps_the_epochs_before(start, undisturbed, kind, tmp_path):
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
        start(faulty.alone, (kind, "epoch 2", False), pool_size(kind))
    assert test_train.newest(tmp_path / "run") == 1
    if kind == "raises":
        test_train.assert_same(test_train.result(start(faulty.alone, NEVER)), undisturbed)


@pytest.mark.parametrize("kind", ["raises", "dies"])
def test_an_evaluation_without_scores_is_empty_and_the_run_goes_on(
    start, undisturbed, kind, capsys
):
    """Its record has null, in strict JSON. The tests above tell all kinds of missing scores apart."""
    folder = start(faulty.alone, (kind, "evaluation after epoch 1", False), pool_size(kind))
    last, arrays, (metrics, evaluations) = test_train.result(folder)
    json.loads((folder / "evals.jsonl").read_text().splitlines()[1], parse_constant=pytest.fail)
    empty = evaluations.pop(1)
    assert empty["reward"] is empty["low"] is empty["high"] is None and (
        empty["num"],
        empty["failed_scores"],
    ) == (0, 4)
    wanted = undisturbed[2][1]
    test_train.assert_same(
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
def test_a_measure_of_weight_0_that_fails_is_counted(start, kind, capsys):
    """It costs no video, not even where it ends its worker. One that hangs is ended with its
    worker, like all videos of the tests above.
    """
    metrics, _ = records(
        start(
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
def test_a_weighted_measure_that_fails_masks_the_video(start, kind, once, caplog):
    fault = kind, "epoch 2", once
    if once:
        metrics, _ = records(
            start(faulty.beside, fault, pool_size(kind), **{"reward.weights.sharpness": 0.5})
        )
        assert [m["failed_scores"] for m in metrics] == [0, 1] and metrics[1]["failed_rewards"] == {
            "sharpness": 1
        }
        assert "the scorer is broken" in caplog.text and len(caplog.records) == 1
        return
    with pytest.raises(UserError, match=r"epoch 2: not one of .*sharpness: .*Epoch 1 is saved"):
        start(faulty.beside, fault, pool_size(kind), **{"reward.weights.sharpness": 0.5})


def test_without_the_base_models_measures_no_epoch_begins(start, tmp_path):
    """The same command makes the first evaluation again, and goes on."""
    weights = {"reward.weights.sharpness": 0.5}
    with pytest.raises(
        UserError, match=r"epoch 0: .*sharpness for fewer than two .*the scorer is broken"
    ):
        start(faulty.beside, ("raises", "evaluation after epoch 0", False), **weights)
    assert not run_log.read_metrics(tmp_path / "run") and not run_log.read_evaluations(
        tmp_path / "run"
    )
    metrics, evaluations = records(start(faulty.beside, NEVER, **weights))
    assert [e["epoch"] for e in evaluations] == [0, 1, 2] and [
        m["failed_scores"] for m in metrics
    ] == [0, 0]


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_an_evaluation_that_is_cut_off_is_made_when_the_run_goes_on(
    start, undisturbed, epoch, monkeypatch
):
    saving = {"save.every": 1}

    class Killed(BaseException):
        pass

    def killed(self, arrays, number, *args):
        if number == epoch:
            raise Killed
        return evaluate(self, arrays, number, *args)

    evaluate = train.Evaluator.__call__
    with monkeypatch.context() as patch:
        patch.setattr(train.Evaluator, "__call__", killed)
        with pytest.raises(Killed):
            start(faulty.alone, NEVER, **saving)
    test_train.assert_same(test_train.result(start(faulty.alone, NEVER, **saving)), undisturbed)


@pytest.mark.parametrize(
    "when, evaluated", [("epoch 1", [0]), ("evaluation after epoch 1", [0, 1])]
)
def test_sigterm_saves_before_and_after_an_evaluation(
    start, undisturbed, when, evaluated, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        phase = train.hosts.stage
        patch.setattr(
            train.hosts,
            "stage",
            lambda name: (phase(name), name.startswith(when) and cli.asked_to_end.set()),
        )
        folder = start(faulty.alone, NEVER)
    assert test_train.newest(folder) == 1
    assert [e["epoch"] for e in run_log.read_evaluations(folder)] == evaluated
    test_train.assert_same(test_train.result(start(faulty.alone, NEVER)), undisturbed)


def spoilt(rows):
    """`initial_noise` with NaN in the samples of these numbers."""

    def noise(key, samples, shape):
        x = initial_noise(key, samples, shape)
        return jnp.where(jnp.isin(samples, jnp.asarray(rows)).reshape(-1, 1, 1, 1, 1), jnp.nan, x)

    return noise


def test_videos_that_are_not_finite_are_masked_and_counted(start, monkeypatch, capsys):
    monkeypatch.setattr(learner, "initial_noise", spoilt([1]))
    monkeypatch.setattr(heldout, "initial_noise", spoilt([0, 2]))
    folder = start(faulty.alone, NEVER)
    metrics, evaluations = records(folder)
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


def test_a_model_that_makes_only_nan_stops_the_run(start, monkeypatch):
    monkeypatch.setattr(learner, "initial_noise", spoilt(range(VIDEOS)))
    with pytest.raises(
        UserError,
        match=rf"epoch 1: not one of .*{VIDEOS} of {VIDEOS} videos are not finite.*damaged",
    ):
        start(faulty.alone, NEVER)


def test_masked_rows_are_blanked_everywhere():
    """In trajectories of two batches and in finished latents."""
    mesh = mesh_lib.make_mesh(devices=jax.devices()[:1])
    me = types.SimpleNamespace(
        sharded=mesh_lib.batch_sharding(mesh), s=types.SimpleNamespace(batches=2)
    )
    finite = np.array([True, False, True, True, True, False])
    latents = [
        jnp.where(jnp.asarray(part).reshape(3, 1, 1, 1, 1), 1.0, jnp.nan)
        * jnp.ones((3, 1, 2, 2, 4))
        for part in finite.reshape(2, 3)
    ]
    steps = [jnp.stack([x, x]) for x in latents]
    trajectories = {
        "transformer": [
            Trajectory(x, x, x[..., 0, 0, 0, 0], jnp.arange(2), "text", kl=jnp.zeros((2, 3)))
            for x in steps
        ]
    }
    Learner.blank(me, trajectories, latents, finite)
    for t, x, kept in zip(trajectories["transformer"], latents, finite.reshape(2, 3)):
        np.testing.assert_array_equal(x[:, 0, 0, 0, 0], kept.astype(float))
        for name in ("x", "x_next", "log_prob"):
            np.testing.assert_array_equal(
                getattr(t, name).reshape(2, 3, -1)[..., 0], [kept.astype(float)] * 2
            )
        assert t.mean is None and t.text == "text"

"""The optimiser steps of an epoch: their order, what they are given, and what is recorded of them."""

import dataclasses
import functools
import types

import numpy as np
import pytest

from grpo.credit import compute_credit
from grpo.learning.data_loss import DataSource
from grpo.methods.dpo import DPO
from grpo.methods.nft import NFT
from grpo.records.run_log import EXPERTS
from grpo.update import (
    NotFinite,
    check_finite,
    data_share,
    kl_share,
    new_warnings,
    summary,
    update_epoch,
    velocity_excess,
)
from tests.grpo.epoch_inputs import rollout_of, scores_of, session_of, states_of
from tests.grpo.specs import tiny_spec

REWARDS = np.linspace(0, 1, 8)


def epoch(spec, update=None):
    """Return (states before, states after, record, arguments of the updates). update: a function or one
    for each expert, instead of the one of `session_of`.
    """
    session, made = session_of(spec)
    if update is not None:
        each = update if isinstance(update, list) else [update] * len(spec.preset.experts)
        vars(session.functions)["updates"] = each
    states, rollout = states_of(spec), rollout_of(spec)
    credit = compute_credit(spec, scores_of(REWARDS), rollout.prompt_of, {})
    new, record = update_epoch(session, states, 1, rollout, credit)
    return states, new, record, made


def test_every_video_is_trained_on_once():
    spec = tiny_spec(**{"train.updates_per_epoch": 2})
    before, after, record, made = epoch(spec)
    assert int(before["transformer"].updates) == 0 and int(after["transformer"].updates) == 2
    assert record["updates"] == len(made) == 2 and record["videos_trained"] == 8
    assert EXPERTS not in record and record["ratio_max_error"] == 0.0
    credit = compute_credit(spec, scores_of(REWARDS), np.repeat([3, 5], 4), {})
    advantages = np.concatenate([batch.advantages.ravel() for batch, _ in made])
    np.testing.assert_allclose(advantages, credit.advantages)
    assert all(batch.valid.all() for batch, _ in made)


@pytest.mark.parametrize("method", ["grpo", "nft", "dpo"])
def test_weights_of_cells_and_the_gate_of_the_kl_go_with_their_videos(method):
    """On 8 x 12 cells, in two updates; the boxes of the videos differ in width."""
    values = {"train.method": method, "train.timesteps": 2, "train.updates_per_epoch": 2}
    values |= {"sample.height": 64, "sample.width": 96, "reward.panel": ("dark",)}
    spec = tiny_spec(**values | {"train.box_credit": 0.5, "train.kl_gate": 0.25})
    session, made = session_of(spec)
    parts = {"dark": np.array([0.5, 0.5, 0.9, 0.5, 0.5, 0.9, 0.5, 0.5])}
    boxes = [{0: ((0.0, 0.0, number / 8, 0.2),)} for number in range(8)]
    scores = dataclasses.replace(scores_of(REWARDS, parts), boxes=boxes)
    rollout = rollout_of(spec)
    credit = compute_credit(spec, scores, rollout.prompt_of, {"dark": (0.5, 0.1)})
    update_epoch(session, states_of(spec), 1, rollout, credit)
    cells, gate = credit.cell_weights(spec, rollout.frames), credit.kl_gate
    assert cells.shape == (8, 1, 8, 12, 1) and np.ptp(cells) > 0.5
    videos = np.array([[[3]], [[7]]]) if method == "dpo" else np.arange(8).reshape(2, 1, 4)
    assert len(made) == 2 and (gate[videos[0]] != gate[videos[1]]).any()
    for number, (batch, _) in enumerate(made):
        np.testing.assert_array_equal(batch.cells, cells[videos[number]])
        np.testing.assert_array_equal(batch.kl_gate, gate[videos[number]])
        if method == "dpo":
            np.testing.assert_array_equal(batch.worse_cells, cells[[[4 * number]]])
        abstract = spec.method.batch_shapes(session.functions, 0)
        for name in ("cells", "worse_cells", "kl_gate"):
            found, wanted = getattr(batch, name, None), getattr(abstract, name, None)
            assert (found is None) == (wanted is None)
            assert found is None or (found.shape, found.dtype) == (wanted.shape, wanted.dtype), name


def test_the_expert_on_the_device_goes_first():
    """The second one, whose steps end the rollout; each has an update and a summary of its own."""
    settings = {"sample.steps": 4, "sample.sde_range": (0, 4), "sample.sde_steps": 2}
    spec, order = tiny_spec("wan2.2-a14b", **settings), []

    def update(expert, state, frozen, batch, share_kept, kl_weight):
        order.append(frozen)
        assert frozen == f"frozen {expert}"
        value = 1.0 if frozen == "frozen 0" else 3.0
        values = {"ratio_min": 1.0, "ratio_max": 1.0, "policy_loss": value}
        return state, types.SimpleNamespace(averages=lambda: values), {"grad_norm": value}

    _, _, record, _ = epoch(spec, [functools.partial(update, expert) for expert in range(2)])
    assert order == ["frozen 1"] * 2 + ["frozen 0"] * 2
    assert list(record[EXPERTS]) == ["transformer_2", "transformer"]
    assert record["updates"] == 4 and record["policy_loss"] == 2.0
    assert record[EXPERTS]["transformer"]["policy_loss"] == 1.0
    assert record.keys() - record[EXPERTS]["transformer"].keys() == {"videos_trained", EXPERTS}


def test_later_updates_may_leave_the_ratio_of_1():
    """Only the first one of an epoch shows whether rollout and update agree."""
    ratios = iter([1.0, 1.5])

    def update(state, frozen, batch, share_kept, kl_weight):
        values = {"ratio_min": 1.0, "ratio_max": next(ratios)}
        return state, types.SimpleNamespace(averages=lambda: values), {"grad_norm": 1.0}

    *_, record, _ = epoch(tiny_spec(**{"train.updates_per_epoch": 2}), update)
    assert record["ratio_max"] == 1.5 and record["ratio_max_error"] == 0.0


def test_the_weight_that_the_guard_sets_reaches_the_updates():
    """And is logged, with the share of the KL by it."""
    spec, given = tiny_spec(**{"train.updates_per_epoch": 2}), []

    def update(state, frozen, batch, share_kept, kl_weight):
        given.append(kl_weight)
        values = {"ratio_min": 1.0, "ratio_max": 1.0, "policy_loss": 0.1, "kl": 0.2}
        return state, types.SimpleNamespace(averages=lambda: values), {"grad_norm": 1.0}

    session, _ = session_of(spec)
    vars(session.functions)["updates"] = [update]
    for weight in (0.5, None):
        rollout = rollout_of(spec)
        credit = compute_credit(spec, scores_of(REWARDS), rollout.prompt_of, {})
        _, record = update_epoch(session, states_of(spec), 1, rollout, credit, weight)
        assert given[-2:] == [weight] * 2 and record.get("kl_weight") == weight
        if weight:
            assert record["kl_share"] == pytest.approx(0.5 * 0.2 / (0.1 + 0.5 * 0.2))


@pytest.mark.parametrize("key", ["grad_norm", "policy_loss"])
def test_an_update_that_is_not_finite_is_named(key):
    def update(state, frozen, batch, share_kept, kl_weight):
        values = {"ratio_min": 1.0, "ratio_max": 1.0, "policy_loss": 0.5} | {key: np.nan}
        norms = {"grad_norm": values.pop("grad_norm", 0.5)}
        return state, types.SimpleNamespace(averages=lambda: values), norms

    with pytest.raises(NotFinite, match=rf"epoch 1: .*\({key}=nan\)"):
        epoch(tiny_spec(), update)


def test_values_that_are_not_finite_are_named():
    check_finite({"kl": 0.0, "grad_norm": 1e30}, 2)
    with pytest.raises(NotFinite, match=r"epoch 2: .*\(kl=nan, grad_norm=inf\)"):
        check_finite({"kl": np.nan, "loss": 1.0, "grad_norm": np.inf}, 2)


def test_an_epoch_keeps_the_mean_and_the_extremes_of_its_updates():
    """The joint record of two experts has the keys of one expert's."""
    first = {
        "kl": 0.1,
        "grad_norm": 3.0,
        "ratio_min": 0.9,
        "ratio_max": 1.1,
        "ratio_max_error": 1e-7,
    }
    second = {"kl": 0.3, "grad_norm": 1.0, "ratio_min": 0.8, "ratio_max": 1.05}
    record = summary([first, second])
    assert record == {
        "updates": 2,
        "kl": pytest.approx(0.2),
        "kl_min": 0.1,
        "kl_max": 0.3,
        "grad_norm": 2.0,
        "grad_norm_min": 1.0,
        "grad_norm_max": 3.0,
        "ratio_min": 0.8,
        "ratio_max": 1.1,
        "ratio_max_error": 1e-7,
    }
    assert summary([first]).keys() == record.keys()
    assert summary([first])["kl"] == summary([first])["kl_max"] == 0.1
    assert summary([]) == {"updates": 0}
    assert summary([{"kl": 1.0}, {"kl": 3.0}, {}])["kl"] == 2.0  # of those that have it
    steps = [{"by_step": {"0": 1.0, "2": 3.0}}, {"by_step": {"0": 2.0}}, {}]
    assert summary(steps) == {"updates": 3, "by_step": {"0": 1.5, "2": 3.0}}
    check_finite(steps[0], 1)


@pytest.mark.parametrize("limit, rms", [(1.0, 1.0), (0.5, 0.5)])
def test_the_gradient_that_adam_gets_is_recorded(limit, rms):
    """Its norm is 1 before clipping, and there are three numbers."""
    *_, record, _ = epoch(tiny_spec(**{"train.max_grad_norm": limit}))
    assert record["grad_rms"] == pytest.approx(rms / 3**0.5)


def test_a_gradient_as_small_as_adam_eps_is_warned_of_once():
    spec, known = tiny_spec(**{"train.adam_eps": 1e-8}), set()
    assert new_warnings(spec, {"grad_rms": 1.1e-7}, known) == []
    assert new_warnings(spec, {"grad_rms": 0.0}, known) == new_warnings(spec, {}, known) == []
    (warning,) = new_warnings(spec, {"grad_rms": 5e-8}, known)
    assert "5.0e-08" in warning and "train.adam_eps=1e-08" in warning
    assert "--config.train.adam_eps=1e-10 " in warning  # at most a hundredth of it
    assert new_warnings(spec, {"grad_rms": 5e-8}, known) == []
    # the method's own warning is of another kind
    record = {"grad_rms": 5e-8, "ratio_max_error": 1.0}
    assert len(new_warnings(spec, record, known)) == 1
    assert known == {"gradient", "method"}


@pytest.mark.parametrize(
    "method, record, found",
    [
        ("nft", {"old_distance_max": 0.3, "old_distance": 0.1}, "old_distance reached 0.3"),
        ("awm", {"old_distance_max": 0.1, "kl_max": 0.25}, "kl reached 0.25"),
        ("dpo", {"kl_max": 0.25}, "kl reached 0.25"),
        ("nft", {"old_distance_max": 0.2, "kl_max": 0.2}, None),
        ("nft", {"updates": 0}, None),
        ("grpo", {"kl_max": 0.25}, None),
    ],
)
def test_what_is_further_than_the_bound(method, record, found):
    values = {"train.method": method, "train.timesteps": 2, "train.max_velocity_distance": 0.2}
    spec = tiny_spec(**values)
    excess = velocity_excess(spec, record)
    assert excess == (found and f"{found}, more than train.max_velocity_distance=0.2")


@pytest.mark.parametrize("method, share", [("grpo", 0.02 / 0.12), ("nft", 0.02 / 0.10)])
def test_share_of_the_kl_in_the_loss(method, share):
    """A policy loss of 0.1, which in flow matching includes the KL 0.2 of weight 0.1."""
    spec = tiny_spec(**{"train.method": method, "train.timesteps": 3})
    values = {"policy_loss": 0.1, "kl": 0.2}
    chosen = spec.settings.method
    assert kl_share(values, chosen, 0.1) == {"kl_share": pytest.approx(share)}
    assert kl_share(values | {"kl_weight": 0.1}, chosen, 7.0)["kl_share"] == pytest.approx(share)
    assert kl_share(dict.fromkeys(values, 0.0), chosen, 0.1) == {"kl_share": 0.0}
    assert kl_share(values, chosen, 0.0) == kl_share({"kl": 0.2}, chosen, 0.1) == {}


def test_no_share_of_a_kl_in_the_reward():
    spec = tiny_spec(**{"train.kl_as": "reward"})
    assert kl_share({"policy_loss": 0.1, "kl": 0.2}, spec.settings.method, 0.1) == {}


def test_the_learning_rate_of_an_epoch_is_recorded():
    spec = tiny_spec(**{"train.updates_per_epoch": 2, "train.warmup_updates": 4})
    session, _ = session_of(spec)
    states = states_of(spec)
    for number, share in ((1, 2 / 4), (2, 1)):  # that of its last update
        rollout = rollout_of(spec)
        credit = compute_credit(spec, scores_of(REWARDS), rollout.prompt_of, {})
        states, record = update_epoch(session, states, number, rollout, credit)
        assert record["learning_rate"] == pytest.approx(spec.recipe.train.learning_rate * share)


def test_copies_follow_the_number_of_the_optimiser_step_in_the_run():
    """The reference of DPO is renewed after each third one, here the first of the second epoch."""
    values = {"train.method": "dpo", "train.updates_per_epoch": 2, "train.timesteps": 2}
    spec = tiny_spec(**values, **{"train.reference_every": 3})
    session, made = session_of(spec)
    states = states_of(spec)
    for number in (1, 2):
        rollout = rollout_of(spec)
        credit = compute_credit(spec, scores_of(REWARDS), rollout.prompt_of, {})
        states, _ = update_epoch(session, states, number, rollout, credit)
    assert [share["old"] for _, share in made] == [1.0, 1.0, 0.0, 1.0]


# ---- with data ---------------------------------------------------------------------------


def test_the_share_of_the_data_in_the_loss():
    values = {"policy_loss": -0.5, "kl": 2.0, "data_error": 3.0}
    grpo, nft = tiny_spec().method, NFT(kl_weight=0.1)
    # |w D| / (|policy| + |KL| + |w D|); NFT's logged loss has the KL
    assert data_share(values, grpo, 0.1, 0.2) == {"data_share": pytest.approx(0.6 / 1.3)}
    assert data_share(values, nft, 0.1, 0.2) == {"data_share": pytest.approx(0.6 / (0.7 + 0.8))}
    assert data_share(values | {"kl_weight": 0.0}, nft, 0.1, 0.2)["data_share"] == pytest.approx(
        0.6 / 1.1
    )
    assert data_share({"policy_loss": 1.0, "kl": 0.0}, grpo, 0.1, 0.2) == {}
    in_reward = tiny_spec(**{"train.kl_as": "reward"}).method  # no term of the loss
    assert data_share(values, in_reward, 0.1, 0.2) == {"data_share": pytest.approx(0.6 / 1.1)}
    assert data_share(values, grpo, 0.1, 0.0) == {"data_share": 0.0}
    assert kl_share(values, grpo, 0.1) == {"kl_share": pytest.approx(0.2 / 0.7)}, "as before"


class Counted:
    """A source that hands out the numbers of its updates."""

    def batch(self, spec, segment, update, rollout=None):
        return (segment, update) if rollout is None else rollout

    batches = DataSource.batches


def test_every_optimiser_step_has_the_data_of_its_number():
    """Counted by the state, so that a run that is resumed goes on with the next ones."""
    spec = tiny_spec(**{"train.updates_per_epoch": 2})
    session, made = session_of(spec, data=Counted())
    rollout = rollout_of(spec)
    credit = compute_credit(spec, scores_of(np.linspace(0, 1, 8)), rollout.prompt_of, {})
    states = states_of(spec)
    for epoch in (1, 2):
        states, _ = update_epoch(session, states, epoch, rollout_of(spec), credit)
    assert [batch.data for batch, _ in made] == [(0, 0), (0, 1), (0, 2), (0, 3)]
    assert all(batch.method.valid.all() for batch, _ in made)


def test_data_can_have_the_noise_of_the_videos_that_count():
    """data.noise=rollout: of each optimiser step, in the epoch."""
    values = {"train.updates_per_epoch": 2, "data.noise": "rollout", "data.path": "data"}
    spec = tiny_spec(**values)
    session, made = session_of(spec, data=Counted())
    rollout = rollout_of(spec)
    rewards = np.array([0.1, np.nan, 0.3, 0.4, 0.5, 0.5, np.nan, 0.9])
    credit = compute_credit(spec, scores_of(rewards), rollout.prompt_of, {})
    update_epoch(session, states_of(spec), 7, rollout, credit)
    used = [batch.data for batch, _ in made]
    assert [u.epoch for u in used] == [7, 7] and all(u.key is rollout.key for u in used)
    assert [u.videos.tolist() for u in used] == [[0, 2, 3], [4, 5, 7]]


def test_an_epoch_on_data_alone(monkeypatch):
    """The copies of earlier weights follow the number of the optimiser step in the run, and know the last
    one of an epoch.
    """
    values = {"train.method": "dpo", "train.updates_per_epoch": 2, "train.timesteps": 2}
    spec, asked = tiny_spec(**values, **{"train.reference_every": 3}), []
    share_kept = DPO.share_kept

    def recorded(self, update, last):
        asked.append((update, last))
        return share_kept(self, update, last)

    monkeypatch.setattr(DPO, "share_kept", recorded)
    session, made = session_of(spec, data=Counted())
    states = states_of(spec)
    for epoch in (1, 2):
        states, record = update_epoch(session, states, epoch, None, None)
        assert record["updates"] == 2 and record["videos_trained"] == 0
    kept = [{"old": share} for share in (1.0, 1.0, 0.0, 1.0)]
    assert made == [((0, number), share) for number, share in enumerate(kept)]
    assert asked == [(1, False), (2, True), (3, False), (4, True)]
    assert int(states["transformer"].updates) == 4

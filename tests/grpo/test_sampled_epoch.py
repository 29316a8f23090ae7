"""An epoch of Flow-GRPO with a tiny model against a plain loop over the steps in NumPy, and the rows of
its updates against the steps of that loop.

Settings that may hide a fault when they are equal differ here: groups, batches and updates have other
sizes, the two experts other weights and guidance, steps are no neighbours, it is not the first epoch, and
the policy is not the base model.
"""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo import setup
from grpo.credit import compute_credit
from grpo.data.prompts import epoch_prompts
from grpo.learning.optimiser import init_state
from grpo.records.clock import Stopwatch
from grpo.sampling import Session, sample_epoch
from grpo.setup import initial_arrays
from grpo.update import update_epoch
from tests import reference
from tests.grpo.epoch_inputs import scores_of
from wan_jax.diffusion.guidance import TextBatch, velocity
from wan_jax.inference.pipeline import TEXT_ROWS, TextTable, Videos
from wan_jax.storage import model_dir

SEED, EPOCH, TEXT, GROUP = 7, 3, 6, 4
STEPS = {
    "seed": SEED,
    "sample.steps": 5,
    "sample.groups": 3,
    "sample.batch_size": 6,
    "sample.group_size": GROUP,
}
NOISE_LEVEL = {"flow_grpo_wan": 1.0, "cps": 0.8, "dance": 0.3}
# of three groups: the first has the smallest spread, below 0.05; the third has the largest
REWARDS = np.array([0.50, 0.52, np.nan, 0.51, 0.3, 0.1, 0.4, 0.2, 0.9, 0.7, 0.0, 0.6])
# latents of size 1 to 4 in float32, after 5 steps with guidance up to 3, against float64
TOLERANCE = 3e-4
CASES = {
    # steps 1 and 3; the KL is part of the reward; one group of three is below the least spread
    "spaced, KL in the reward": (
        1,
        {
            "sample.sde_window": "spaced",
            "sample.sde_range": (1, 5),
            "sample.sde": "dance",
            "sample.shared_noise": True,
            "sample.guidance": 2.5,
            "train.updates_per_epoch": 1,
            "train.kl_as": "reward",
            "train.kl_weight": 0.5,
            "train.min_group_std": 0.05,
        },
    ),
    "one step a group, two experts": (
        2,
        {
            "sample.sde_window": "one_per_group",
            "sample.sde_range": (1, 5),
            "sample.sde_steps": 1,
            "sample.shared_noise": True,
            "sample.guidance": 2.0,
            "sample.guidance_2": 3.0,
            "train.updates_per_epoch": 1,
            "train.kl_as": "reward",
            "train.kl_weight": 0.5,
            "train.advantage_std": "global",
        },
    ),
    # step 0 has noise and is not trained; of the other steps the first expert has its only one, the
    # second one two of three
    "noise everywhere, two experts": (
        2,
        {
            "sample.sde_window": "any",
            "sample.sde_steps": 3,
            "sample.sde_range": (1, 5),
            "sample.sde": "cps",
            "sample.batch_size": 2,
            "sample.shared_noise": True,
            "sample.untrained_noise": True,
            "sample.guidance": 1.5,
            "sample.guidance_2": 2.5,
            "train.groups": 2,
            "train.best_of": 1,
            "train.advantage_std": "group",
        },
    ),
}


COUNTED = dict.fromkeys(CASES, np.isfinite(REWARDS)) | {
    "noise everywhere, two experts": np.isin(np.arange(12), [5, 6, 8, 10])
}


class Epoch:
    """An epoch of a run: what it sampled and submitted, and its session."""

    def __init__(self, spec, model, prompts):
        rng = np.random.default_rng(0)
        self.spec = spec
        self.frozen = [
            model_dir.build(name, model, dtype=jnp.float32, mesh=spec.mesh)[1]
            for name in spec.preset.experts
        ]
        texts = rng.standard_normal(
            (len(prompts) + 1, TEXT, spec.preset.transformer.text_dim), np.float32
        )
        self.table = TextTable(tuple(texts[:-1]), texts[-1], TEXT)
        begin = initial_arrays(spec, self.frozen.__getitem__, None, spec.preset.experts)
        # adapters that are not 0, so that the policy differs from the base model
        self.start = {
            name: {
                key: x + 0.1 * rng.standard_normal(x.shape, np.float32)
                for key, x in sorted(arrays.items())
            }
            for name, arrays in begin.items()
        }
        self.states = {
            name: init_state(self.start[name], spec.settings.optimiser) for name in spec.trained
        }
        self.functions = setup.Functions(spec, TEXT)
        self.computed, self.submitted, self.final = 0, [], []
        self.batches = {expert: [] for expert in spec.trained_experts}
        vars(self.functions)["steps"] = [self.counted(step) for step in self.functions.steps]
        vars(self.functions)["updates"] = [*map(self.update_of, spec.trained_experts)]
        self.session = Session(
            functions=self.functions,
            prompts=prompts,
            table=self.table,
            decode=self.decode,
            pool=self,
            frozen=self.frozen.__getitem__,
            start=self.start,
            to_device=lambda arrays: arrays,
            progress=lambda batches, **options: batches,
        )
        self.rollout, _ = sample_epoch(self.session, self.states, EPOCH, Stopwatch())

    def counted(self, step):
        """Return a denoising step that counts its videos."""

        def call(trainable, frozen, x, *rest):
            self.computed += len(x)
            return step(trainable, frozen, x, *rest)

        return call

    def update_of(self, expert: int):
        """Return an update of an expert that keeps its batch and changes nothing."""
        metrics = types.SimpleNamespace(averages=lambda: {"ratio_min": 1.0, "ratio_max": 1.0})

        def update(state, frozen, batch, share_kept, kl_weight):
            self.batches[expert].append(batch)
            return state, metrics, {"grad_norm": 1.0}

        return update

    def decode(self, latents):
        self.final.append(np.asarray(latents))
        return lambda: Videos(np.zeros((len(latents), 1)), np.ones(len(latents), bool))

    def submit(self, frames, records, groups, group_size):
        self.submitted += zip(records, groups, [group_size] * len(records))


class Plain:
    """The videos of an epoch, all in one batch, step by step.

    Attributes:
        x: latents before each step and after the last one, [T + 1, N, ...].
        kl, log_prob: of each step, if it is stochastic, [T, N]. The KL is to the base model.
    """

    def __init__(self, epoch: Epoch):
        spec, rollout = epoch.spec, epoch.rollout
        sample, videos = spec.recipe.sample, spec.settings.videos
        texts = np.stack([epoch.table.prompts[p] for p in rollout.prompt_of])
        self.text = TextBatch(
            jnp.asarray(texts), jnp.asarray(epoch.table.negative), TEXT_ROWS - TEXT
        )
        scales = sample.guidance, sample.guidance_2
        self.run = [make_velocities(epoch.functions.policy, scale) for scale in scales]
        sigmas = spec.schedule.sigmas.astype(np.float64)
        g = reference.diffusion_coefficient(sample.sde, sigmas, NOISE_LEVEL[sample.sde])
        mean_std = reference.cps_mean_std if sample.sde == "cps" else reference.mean_std
        first = np.arange(videos) // GROUP * GROUP if sample.shared_noise else np.arange(videos)
        shape = spec.shape
        self.x = [np.stack([noise_of(video, 2**31 - 1, shape) for video in first])]
        self.kl, self.log_prob = np.zeros((2, sample.steps, videos))
        for i in range(sample.steps):
            (segment,) = [n for n, part in enumerate(spec.segments) if i in part.steps]
            v, v_ref = self.velocities(epoch, spec.segments[segment].expert, i)
            stochastic = self.stochastic(spec, segment, i) | sample.untrained_noise
            rows = []
            for video, x in enumerate(self.x[-1]):
                s, s_next = sigmas[i], sigmas[i + 1]
                mean, std = mean_std(x, v[video], s, s_next, g[i])
                mean_ref, _ = mean_std(x, v_ref[video], s, s_next, g[i])
                if std > 0:
                    self.kl[i, video] = reference.kl(
                        "flow_grpo", mean, mean_ref, None, None, std, g[i]
                    )
                noisy = mean + std * noise_of(video, i, shape)
                self.log_prob[i, video] = reference.log_prob(noisy, mean, std)
                rows.append(noisy if stochastic[video] else x + v[video] * (s_next - s))
            self.x.append(np.stack(rows))

    @staticmethod
    def stochastic(spec, segment: int, step: int) -> np.ndarray:
        """Return which videos are trained at a step, bool [N]."""
        window = spec.windows.of_epoch(spec.recipe.seed, EPOCH)[segment]
        if window.ndim == 2:
            return window[0] == step
        return np.full(spec.settings.videos, step in window)

    def velocities(self, epoch: Epoch, expert: int, step: int) -> list[np.ndarray]:
        """Return the velocities of the policy and of the base model, float64 [N, ...]."""
        arrays = epoch.start[epoch.spec.preset.experts[expert]], epoch.frozen[expert]
        x, t = jnp.asarray(self.x[-1], jnp.float32), epoch.spec.schedule.timesteps[step]
        return [np.asarray(v, np.float64) for v in self.run[expert](*arrays, x, t, self.text)]


def make_velocities(policy, guidance):
    """Return the jitted function (trainable, frozen, x, t, text) -> velocities of policy and base model."""

    @jax.jit
    def run(trainable, frozen, x, t, text):
        modules = policy.module(trainable, frozen), policy.reference(frozen)
        return [velocity(module, x, t, text, guidance) for module in modules]

    return run


def noise_of(video: int, step: int, shape) -> np.ndarray:
    """The documented draw of (seed, epoch, video, step): of the stream of the rollout, 1."""
    key = jax.random.key(SEED)
    for number in (1, EPOCH, int(video), step):
        key = jax.random.fold_in(key, number)
    return np.asarray(jax.random.normal(key, shape, jnp.float32), np.float64)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_an_epoch_is_that_of_a_plain_loop(start, name):
    experts, values = CASES[name]
    spec, model, prompts, *_ = start(1, experts, **STEPS | values)
    epoch = Epoch(spec, model, prompts)
    rollout, plain = epoch.rollout, Plain(epoch)
    videos, sample = spec.settings.videos, spec.recipe.sample

    # ---- the rollout: latents, what was computed, what is scored -------------------------------
    chosen = epoch_prompts(spec.recipe.seed, EPOCH - 1, len(prompts), sample.groups)
    np.testing.assert_array_equal(rollout.prompt_of, np.repeat(chosen, GROUP))
    np.testing.assert_allclose(np.concatenate(epoch.final), plain.x[-1], atol=TOLERANCE)
    assert rollout.evaluations == epoch.computed
    assert rollout.evaluations + rollout.evaluations_saved == videos * sample.steps
    targets = [prompts.targets[prompt] for prompt in rollout.prompt_of]
    assert epoch.submitted == [(targets[n], n // GROUP, GROUP) for n in range(videos)]
    groups = plain.x[-1].reshape(sample.groups, GROUP, -1)
    assert rollout.group_spread == pytest.approx(groups.std(1).mean(), rel=1e-3)

    # ---- the rows of the updates ---------------------------------------------------------------
    credit = compute_credit(spec, scores_of(REWARDS), rollout.prompt_of, {})
    _, record = update_epoch(epoch.session, epoch.states, EPOCH, rollout, credit)
    assert record["videos_trained"] == COUNTED[name].sum()
    for number, part in enumerate(spec.segments):
        trained = {
            (video, step)
            for step in part.steps
            for video in np.flatnonzero(plain.stochastic(spec, number, step))
        }
        found = []
        for batch in epoch.batches[part.expert]:
            abstract = spec.method.batch_shapes(epoch.functions, part.expert)
            assert jax.tree.map(jnp.shape, batch) == jax.tree.map(jnp.shape, abstract)
            for video, step, text, advantage in rows_of(batch, plain):
                np.testing.assert_array_equal(text, plain.text.embeddings[video])
                wanted = advantages_at(spec, plain, number, step)[video]
                assert advantage == pytest.approx(wanted, abs=1e-3)
                found.append((video, step))
        assert sorted(found) == sorted(row for row in trained if COUNTED[name][row[0]])
        if spec.recipe.train.kl_as == "reward":
            logged = record.get("experts", {}).get(spec.preset.experts[part.expert], record)
            wanted = np.mean([plain.kl[step, video] for video, step in trained])
            assert logged["kl"] == pytest.approx(wanted, rel=1e-3)


def rows_of(batch, plain: Plain) -> list[tuple]:
    """Return (video, step, text, advantage) of each row that counts, in any order. The video is the one
    whose latents after the step are those of the row; those before it and the log-prob must be its own.
    """
    found = []
    for m, k, b in np.ndindex(batch.log_prob.shape):
        if not batch.valid[m, b]:
            continue
        step = int(batch.step[m, k] if batch.step.ndim == 2 else batch.step[m, k, b])
        whole = batch.latents.shape[1] == batch.log_prob.shape[1] + 1
        first = k if whole else 2 * k
        x, x_next = np.asarray(batch.latents[m, first : first + 2, b])
        video = int(np.abs(plain.x[step + 1] - x_next).reshape(len(plain.x[0]), -1).max(1).argmin())
        np.testing.assert_allclose(x_next, plain.x[step + 1][video], atol=TOLERANCE)
        np.testing.assert_allclose(x, plain.x[step][video], atol=TOLERANCE)
        log_prob = pytest.approx(plain.log_prob[step, video], abs=TOLERANCE)
        assert float(batch.log_prob[m, k, b]) == log_prob
        by_step = batch.advantages.ndim == 3
        advantage = batch.advantages[m, k, b] if by_step else batch.advantages[m, b]
        found.append((video, step, batch.text.embeddings[m, b], float(advantage)))
    return found


def advantages_at(spec, plain: Plain, segment: int, step: int) -> np.ndarray:
    """Return the advantages of the videos at a step, [N], where their group has enough spread."""
    train, valid = spec.recipe.train, np.isfinite(REWARDS)
    weight = train.kl_weight if train.kl_as == "reward" else 0.0
    groups = np.arange(len(REWARDS)) // GROUP
    for group in range(len(REWARDS) // GROUP):
        members = REWARDS[(groups == group) & valid]
        valid &= (groups != group) | (members.std() >= train.min_group_std)
    valid &= np.isin(np.arange(len(REWARDS)), spec.windows.videos(segment))
    window = spec.windows.of_epoch(SEED, EPOCH)[segment]
    own = window[0] if window.ndim == 2 else np.full(len(REWARDS), step)
    rewards = REWARDS - weight * plain.kl[own, np.arange(len(REWARDS))]
    return reference.group_advantages(rewards, groups, valid, train.advantage_std, 1e-4)

"""The policy's confidence in its own videos as a reward (SOLACE, Kim et al., CVPR 2026).

A finished video x0 is noised again, z = (1 - s) x0 + s e, and the policy is asked for the noise: with its
velocity v the error at level s is mean over probes and values of (v + x0 - e)^2, S = -log of that. The
levels are those of the second half of the rollout's steps, and PROBES draws of noise are shared by the
videos of a group. S is standardised over the epoch's videos at each level, and the mean over the levels
has the weights s (1 - s):

    R = sum_s s (1 - s) (S_s - mean(S_s)) / std(S_s) / sum_s s (1 - s)

as in the authors' code, according to notes on it; the paper has 8 probes and the last 60 % of the steps.
Only the model itself judges, so it may become surer of pictures that show less: a frozen model
has preferred one without the subject of its prompt.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from grpo.learning.policy import COMPILER_OPTIONS, Policy
from grpo.learning.velocity_loss import mean_square
from grpo.random_streams import Stream
from grpo.rollout import sample_noise
from grpo.scoring.scores import gather_rows
from wan_jax.diffusion.guidance import TextBatch, velocity
from wan_jax.distributed import sharding as sharding_lib

if TYPE_CHECKING:
    from grpo.run import RunSpec
    from grpo.sampling import RolloutBatch, Session, States

Array = jax.Array
PROBES = 4


def make_probe(policy: Policy, guidance: float) -> Callable:
    """Return the jitted function (trainable, frozen, x0, text, key, group, step, sigma, timestep) -> error
    of the noise, fp32 [B], at one noise level.

    x0: fp32 [B, F, H, W, C]. key: JAX key of the epoch. group: int32 [B]. step: int32 [], number of the
    level. sigma, timestep: fp32 []. guidance: of the velocity.
    """

    @partial(jax.jit, compiler_options=COMPILER_OPTIONS)
    def probe(
        trainable: Any, frozen, x0, text: TextBatch, key, group, step, sigma, timestep
    ) -> Array:
        module = policy.module(trainable, frozen)

        def error(number) -> Array:
            noise = sample_noise(
                Stream.PROBES.key(key), group, step * PROBES + number, x0.shape[1:]
            )
            z = (1 - sigma) * x0 + sigma * noise
            v = velocity(module, z, jnp.broadcast_to(timestep, group.shape), text, guidance)
            return mean_square(v + x0 - noise)

        return jax.lax.map(error, jnp.arange(PROBES)).mean(0)

    return probe


def probed_steps(spec: "RunSpec") -> range:
    """Return the steps of the rollout at whose noise levels videos are probed: its second half."""
    return range(spec.recipe.sample.steps // 2, spec.recipe.sample.steps)


def probed_guidance(spec: "RunSpec") -> tuple[float, ...]:
    """Return the guidance of each expert's velocity: the rollout's, if it is trained."""
    return spec.sampling_guidance if spec.method.guided else (1.0,) * len(spec.preset.experts)


def measure_errors(session: "Session", states: "States", rollout: "RolloutBatch") -> np.ndarray:
    """Return the error of the noise of each video at each of `probed_steps`, float64 [L, N]."""
    spec, sample = session.spec, session.spec.recipe.sample
    sharded, size = sharding_lib.batch_sharding(spec.mesh), sample.batch_size
    steps, errors = probed_steps(spec), []
    for segment in spec.segments:
        inside = range(max(segment.steps.start, steps.start), segment.steps.stop)
        if not inside:
            continue
        name = spec.preset.experts[segment.expert]
        weights = states[name].trainable if name in states else session.start[name]
        probe, frozen = session.functions.probes[segment.expert], session.frozen(segment.expert)
        of_segment = []
        for b, x0 in enumerate(rollout.finished):
            rows = np.arange(b * size, (b + 1) * size)
            group = sharding_lib.place((rows // sample.group_size).astype(np.int32), sharded)
            text = rollout.texts(rollout.prompt_of[rows])
            found = [
                probe(
                    weights,
                    frozen,
                    x0,
                    text,
                    rollout.key,
                    group,
                    step,
                    float(spec.schedule.sigmas[step]),
                    float(spec.schedule.timesteps[step]),
                )
                for step in inside
            ]
            of_segment.append(jnp.stack(found))
        jax.block_until_ready(of_segment)  # the next expert may take the place of this one
        errors.append(gather_rows(of_segment, sharded))
    return np.concatenate(errors).astype(np.float64)


def confidence(errors: np.ndarray, sigma: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Return R of each video, float64 [N]; nan where it is not valid or an error is not finite. A level at
    which all videos are alike counts as 0.

    errors: [L, N], above 0. sigma: [L], noise levels. valid: bool [N], videos that count in mean and std.
    """
    counted = valid & np.isfinite(errors).all(0) & (errors > 0).all(0)
    result = np.full(errors.shape[1], np.nan)
    if not counted.any():
        return result
    sure = -np.log(errors[:, counted])
    spread = sure.std(1, keepdims=True)
    z = (sure - sure.mean(1, keepdims=True)) / np.where(spread > 0, spread, 1.0)
    weight = (sigma * (1 - sigma))[:, None].astype(np.float64)
    result[counted] = (weight * z).sum(0) / max(weight.sum(), 1e-12)
    return result


def measure_confidence(
    session: "Session", states: "States", rollout: "RolloutBatch", valid: np.ndarray
) -> tuple[np.ndarray | None, dict[str, float]]:
    """Return (`confidence` of an epoch's videos, {"confidence": mean of S} for the log); (None, {}) where
    it has no weight. valid: bool [N].
    """
    spec = session.spec
    if not spec.recipe.reward.confidence:
        return None, {}
    errors = measure_errors(session, states, rollout)
    rewards = confidence(errors, spec.schedule.sigmas[np.array(probed_steps(spec))], valid)
    counted = np.isfinite(rewards)
    mean = float(-np.log(errors[:, counted]).mean()) if counted.any() else 0.0
    return rewards, {"confidence": mean}

"""GRPO's relatives that train on finished videos: DiffusionNFT, Flow-DPO, Flow-RWR and supervised
fine-tuning.

They need no log-prob, so the rollout is the plain ODE. Its results x0 are noised again, x_s = (1 -
s) x0 + s e, at noise levels s drawn afresh (papers write t), and the loss compares velocities
there; the true one is e - x0. Videos are sampled with guidance as configured; what is trained is
the conditional velocity without guidance, DiffusionNFT's published form, also for the others, or
the guided one that sampled. Which videos are trained on, and with what weight:
`grpo.methods.selection`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np

from grpo.methods.losses import kl_to_reference
from grpo.methods.selection import Selection
from grpo.policy import Flat, Policy
from grpo.rollout import branch, sample_noise
from wan_jax.diffusion.experts import Segment
from wan_jax.diffusion.guidance import TextBatch, pair, velocity
from wan_jax.diffusion.schedule import Schedule
from wan_jax.diffusion.solvers import per_sample
from wan_jax.distributed import mesh as mesh_lib

Array = jax.Array
FORWARD_METHODS = ("nft", "dpo", "rwr", "sft")
LEAST_LEVEL = 1e-3
KEY = 2**31 - 1  # no video has this number, under which the rollout's draws lie


@dataclasses.dataclass(frozen=True)
class ForwardConfig:
    """The method, and what belongs to it.

    'nft'  DiffusionNFT (arXiv 2509.16117): `nft_loss`. Videos are sampled by the old policy, which
    after an epoch, and
           n updates in all, becomes d old + (1 - d) new with d = min(old_rate n, old_most).
    'dpo'  Flow-DPO (arXiv 2501.13918): `dpo_loss` on the best and the worst video of each group.
    The reference is the
           base model, or with reference_every > 0 the policy as it was copied every so many updates
           (online DPO).
    'rwr'  Flow-RWR (the same paper): flow matching with a weight for each video,
    `preferences.regression_weights`. 'sft'  supervised fine-tuning: flow matching on the best video
    of each group. All but 'dpo' add kl_beta mean((v - v_ref)^2), v_ref the base model's.
    """

    method: str = "nft"
    nft_beta: float = 0.1
    # of 'nft': the advantage of a surely good video; scales the loss too, as published
    advantage_clip: float = 5.0
    old_rate: float = 1e-3
    old_most: float = 0.5
    dpo_beta: float = 100.0
    reference_every: int = 0
    temperature: float = 1.0  # of 'rwr'
    kl_beta: float = 0.0
    # train the velocity with guidance, and compare it with the others' with guidance
    guided: bool = False

    def __post_init__(self):
        if self.method not in FORWARD_METHODS:
            raise ValueError(
                f"method={self.method!r} is unknown; choose one of {', '.join(FORWARD_METHODS)}"
            )
        for name in ("nft_beta", "advantage_clip", "dpo_beta", "temperature"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)} must be finite and above 0")
        if not (0 <= self.old_rate and 0 <= self.old_most < 1):
            raise ValueError(
                f"old_rate={self.old_rate}, old_most={self.old_most}: need 0 <= old_rate and 0 <= "
                "old_most < 1; 0.001 and 0.5 are usual, and at 1 the old policy would never move"
            )
        if self.reference_every < 0:
            raise ValueError(
                f"reference_every={self.reference_every} must be at least 0, the base model"
            )
        if not 0 <= self.kl_beta < float("inf"):
            raise ValueError(
                f"kl_beta={self.kl_beta}: must be finite and >= 0; 0 switches the reference off"
            )

    @property
    def keeps_old(self) -> bool:
        """Whether the run's state has weights of an earlier update: NFT's old policy, online DPO's
        reference.
        """
        return self.method == "nft" or (self.method == "dpo" and self.reference_every > 0)

    @property
    def needs_reference(self) -> bool:
        """Whether the loss asks the base model."""
        return not self.keeps_old if self.method == "dpo" else self.kl_beta > 0

    def old_kept(self, updates: int, last: bool) -> tuple[float, ...]:
        """How much of themselves the old weights keep in an update: 1, they stay as they are, 0,
        they become the new ones. updates: how many the run has made, this one included; last: of
        its epoch. () where there are none.
        """
        if not self.keeps_old:
            return ()
        if self.method == "dpo":
            return (1.0 if updates % self.reference_every else 0.0,)
        return (float(min(self.old_rate * updates, self.old_most)) if last else 1.0,)


# ---- noise levels, on the host -------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Levels:
    """What each of N videos is noised to for one expert: K draws."""

    sigma: np.ndarray  # [N, K] fp32
    timestep: np.ndarray  # [N, K] fp32, what the model is fed, 0..1000
    draw: np.ndarray  # [K] int32, numbers of the draws, other ones for the other expert


def noise_levels(
    config: ForwardConfig,
    seed: int,
    epoch: int,
    videos: int,
    expert: int,
    parts: Sequence[Segment],
    quotas: Sequence[int],
    schedule: Schedule,
    boundary: float | None,
) -> Levels:
    """As many as the expert's quota, a function of (seed, epoch, expert, video, draw).

    The expert answers for timesteps from 1000 boundary up (expert 0) or below (expert 1). Draw j of
    K is from the j-th of K equal parts of the distribution, so that few draws cover it. 'nft': the
    rollout's steps, each as likely, as published. The others: logit-normal, s = sigmoid(N(0, 1))
    (Esser et al., arXiv 2403.03206), restricted to the expert's levels and to [1e-3, 1 - 1e-3].
    """
    at = next(i for i, part in enumerate(parts) if part.expert == expert)
    steps, count = parts[at].steps, quotas[at]
    draw = sum(quotas[:at]) + np.arange(count, dtype=np.int32)
    rng = np.random.default_rng([seed, epoch, 0xF0A, expert])
    share = (np.arange(count) + rng.random((videos, count))) / count  # from 0 to 1
    if config.method == "nft":
        step = np.minimum(steps.start + (share * len(steps)).astype(int), steps.stop - 1)
        return Levels(schedule.sigmas[step], schedule.timesteps[step], draw)
    low, high = (0.0, 1.0) if boundary is None else ((boundary, 1.0), (0.0, boundary))[expert]
    low, high = max(low, LEAST_LEVEL), min(high, 1 - LEAST_LEVEL)
    normal = NormalDist()
    first, last = (normal.cdf(np.log(level / (1 - level))) for level in (low, high))
    quantile = np.vectorize(normal.inv_cdf)(first + share * (last - first))
    sigma = np.clip(1 / (1 + np.exp(-quantile)), low, high).astype(np.float32)
    return Levels(sigma, 1000 * sigma, draw)


# ---- losses, [B] each ----------------------------------------------------------------------------
def mean_square(x: Array) -> Array:
    """Over all but B, [B] fp32."""
    return jnp.mean(jnp.square(x.astype(jnp.float32)), axis=tuple(range(1, x.ndim)))


def nft_loss(
    x: Array, x0: Array, sigma: Array, v: Array, v_old: Array, optimality: Array, beta: float
) -> Array:
    """DiffusionNFT (arXiv 2509.16117) with its adaptive weighting, [B]: with r the optimality,

        r l(v+) / beta + (1 - r) l(v-) / beta,   v+ = (1 - beta) v_old + beta v,   v- = (1 + beta)
                                                 v_old - beta v,
        l(v) = mean((x - s v - x0)^2) / w,       w = max(mean |x - s v - x0|, 1e-5), a constant to
                                                 the gradient.

    x, x0, v, v_old [B, ...]; sigma, optimality [B]. At v = v_old the gradient is that of (2 r - 1)
    l(v): a video of r = 1/2 leaves the policy where it is.
    """
    s = per_sample(sigma, x)

    def error(v):  # of the predicted clean sample
        difference = x - s * v - x0
        size = jnp.mean(jnp.abs(difference), axis=tuple(range(1, x.ndim)))
        return mean_square(difference) / jax.lax.stop_gradient(jnp.maximum(size, 1e-5))

    better, worse = (1 - beta) * v_old + beta * v, (1 + beta) * v_old - beta * v
    return (optimality * error(better) + (1 - optimality) * error(worse)) / beta


def dpo_loss(margin: Array, beta: float) -> Array:
    """-log sigmoid(-beta / 2 margin), [B] (Flow-DPO, arXiv 2501.13918, with a constant beta).
    margin [B]: how much more than the reference's the policy's error is on the better video, less
    the same on the worse.
    """
    return -jax.nn.log_sigmoid(-0.5 * beta * margin)


# ---- the gradient of one update ------------------------------------------------------------------
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ForwardBatch:
    """M micro-batches of one optimiser step, K noise levels a video. Of 'dpo' B pairs, otherwise B
    videos.
    """

    x0: Array  # [M, B, F, H, W, C] fp32, latents of the videos; of 'dpo' the better ones
    worse: Array | None  # [M, B, F, H, W, C] of 'dpo' alone
    text: TextBatch  # arrays with a leading axis M
    video: Array  # [M, B] int32, the video's number in the epoch
    sigma: Array  # [M, K, B] fp32
    timestep: Array  # [M, K, B] fp32, 0..1000
    weight: Array  # [M, B] fp32: NFT's optimality, RWR's weight
    valid: Array  # [M, B] bool: False leaves a row out of the mean
    draw: Array  # [K] int32; noise is a function of (key, video, draw)
    key: Array  # of the epoch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ForwardMetrics:
    """Sums over the counted rows, as `losses.LossMetrics`."""

    count: Array
    policy_loss: Array
    flow_error: Array  # mean((v - (e - x0))^2), of a pair the better one's
    kl: Array  # mean((v - v_ref)^2)
    preferred: Array | None  # 'dpo': pairs with a negative margin

    @classmethod
    def zero(cls, method: str) -> "ForwardMetrics":
        zero = jnp.zeros((), jnp.float32)
        return cls(zero, zero, zero, zero, zero if method == "dpo" else None)

    def averages(self) -> dict[str, float]:
        """For logging, on the host; 0 with no rows."""
        n = max(float(self.count), 1.0)
        return {
            f.name: float(value) / n
            for f in dataclasses.fields(self)
            if f.name != "count" and (value := getattr(self, f.name)) is not None
        }


def objective(
    policy: Policy,
    config: ForwardConfig,
    guidance: float,
    trainable: Flat,
    old: Flat | None,
    frozen,
    x0,
    worse,
    text: TextBatch,
    video,
    weight,
    valid,
    sigma,
    timestep,
    draw,
    key,
) -> tuple[Array, ForwardMetrics]:
    """Sum of the loss over the valid rows of one micro-batch at one draw, and its metrics. [B] and
    [B, ...] all.
    """
    noise = sample_noise(key, video, draw, x0.shape[1:])
    if worse is not None:  # one noise and one level for both of a pair
        x0, noise, sigma, timestep = (
            pair(x0, worse),
            pair(noise, noise),
            pair(sigma, sigma),
            pair(timestep, timestep),
        )
        text = dataclasses.replace(text, embeddings=pair(text.embeddings, text.embeddings))
    s = per_sample(sigma, x0)
    x, target = (1 - s) * x0 + s * noise, noise - x0

    def v_of(module):
        return velocity(module, x, timestep, text, guidance)

    v = v_of(policy.module(trainable, frozen))
    v_old = None if old is None else jax.lax.stop_gradient(v_of(policy.module(old, frozen)))
    v_ref = (
        jax.lax.stop_gradient(v_of(policy.reference(frozen))) if config.needs_reference else None
    )
    error, preferred = mean_square(v - target), None
    kl = (
        jnp.zeros_like(error) if v_ref is None else kl_to_reference(v, v_ref, None, kind="velocity")
    )
    if config.method == "dpo":
        excess = error - mean_square((v_ref if v_old is None else v_old) - target)
        margin, error, kl = excess[::2] - excess[1::2], error[::2], kl[::2]
        loss, preferred = dpo_loss(margin, config.dpo_beta), margin < 0
    elif config.method == "nft":
        loss = (
            config.advantage_clip * nft_loss(x, x0, sigma, v, v_old, weight, config.nft_beta)
            + config.kl_beta * kl
        )
    else:
        loss = weight * error + config.kl_beta * kl

    def total(values):
        return jnp.sum(jnp.where(valid, values, 0.0))

    metrics = ForwardMetrics(
        total(1.0),
        total(loss),
        total(error),
        total(kl),
        None if preferred is None else total(preferred),
    )
    return total(loss), jax.lax.stop_gradient(metrics)


def make_gradient(policy: Policy, config: ForwardConfig, guidance: float = 1.0) -> Callable:
    """(trainable, `update.Held`, frozen, ForwardBatch) -> (mean gradient of the objective over the
    valid rows and their noise levels, ForwardMetrics). guidance: of every velocity in the loss, up
    to 1 for none.
    """
    grad_fn = jax.grad(partial(objective, policy, config, guidance), has_aux=True)

    def gradient(trainable: Flat, held, frozen, batch: ForwardBatch):
        def one_draw(carry, level, rows):
            grads, metrics = grad_fn(trainable, held.old, frozen, *rows, *level, batch.key)
            return jax.tree.map(jnp.add, carry, (grads, metrics)), None

        def one_micro_batch(carry, micro):
            *rows, sigma, timestep = micro
            return jax.lax.scan(partial(one_draw, rows=rows), carry, (sigma, timestep, batch.draw))[
                0
            ], None

        carry = (jax.tree.map(jnp.zeros_like, trainable), ForwardMetrics.zero(config.method))
        (grads, metrics), _ = jax.lax.scan(
            one_micro_batch,
            carry,
            (
                batch.x0,
                batch.worse,
                batch.text,
                batch.video,
                batch.weight,
                batch.valid,
                batch.sigma,
                batch.timestep,
            ),
        )
        return jax.tree.map(lambda g: g / jnp.maximum(metrics.count, 1.0), grads), metrics

    return gradient


def gather(latents: Sequence[Array], videos: np.ndarray, mesh: jax.sharding.Mesh) -> Array:
    """The latents of videos [M, B], [M, B, ...] fp32. latents: the rollout's batches, in order."""
    sharding, size = mesh_lib.batch_sharding(mesh), len(latents[0])

    def batch(row):
        if (
            len(row) == size
            and row[0] % size == 0
            and np.array_equal(row, row[0] + np.arange(size))
        ):
            return latents[row[0] // size]  # as it was sampled
        return branch(
            latents, mesh_lib.place(row.astype(np.int32), mesh_lib.replicated(mesh)), sharding
        )

    return jnp.stack([batch(row) for row in videos])


def stack(
    selected: Selection,
    latents: Sequence[Array],
    texts: Sequence[TextBatch],
    levels: Levels,
    epoch_key,
    mesh: jax.sharding.Mesh,
) -> ForwardBatch:
    """One update's batch. selected: one of `Selection.batches`; latents: the rollout's; texts: one
    a micro-batch.
    """
    sharding = mesh_lib.batch_sharding(mesh)
    worse = None if selected.worse is None else gather(latents, selected.worse, mesh)
    sigma, timestep = (
        jnp.asarray(np.moveaxis(x[selected.videos], -1, 1)) for x in (levels.sigma, levels.timestep)
    )
    video = jnp.stack([mesh_lib.place(row.astype(np.int32), sharding) for row in selected.videos])
    return ForwardBatch(
        gather(latents, selected.videos, mesh),
        worse,
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *texts),
        video,
        sigma,
        timestep,
        jnp.asarray(selected.weight),
        jnp.asarray(selected.valid),
        jnp.asarray(levels.draw),
        jax.random.fold_in(epoch_key, KEY),
    )

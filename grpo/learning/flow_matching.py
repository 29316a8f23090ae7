"""The family of methods that train on finished videos, noised again: NFT, DPO, RWR, SFT, AWM.

They need no log-prob of the rollout, which is therefore the plain ODE. Its results x0 are noised
again, x_s = (1 - s) x0 + s e, at noise levels s drawn afresh (papers write t), and the loss compares
velocities there; the true one is e - x0. Videos are sampled with guidance as configured. What is
trained is the conditional velocity without guidance, DiffusionNFT's published form, or with
train.guided the guided one that sampled.

A method derives from `FlowMatching` and states which videos it trains on (`select`), its loss
(`loss`), and which earlier weights it compares with (`lagged`).
"""

import abc
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import NormalDist
from typing import TYPE_CHECKING, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from grpo.learning.kl import kl_to_reference
from grpo.learning.method import Method, kl_weight
from grpo.learning.policy import Flat, Policy
from grpo.learning.selection import Selection, layout
from grpo.random_streams import Stream
from grpo.rollout import branch, sample_noise
from wan_jax.diffusion.experts import Segment
from wan_jax.diffusion.guidance import TextBatch, pair, velocity
from wan_jax.diffusion.schedule import Schedule
from wan_jax.diffusion.solvers import per_sample
from wan_jax.distributed import mesh as mesh_lib
from wan_jax.distributed import sharding as sharding_lib
from wan_jax.errors import UserError

if TYPE_CHECKING:
    from grpo.compiled.functions import Functions
    from grpo.credit import Credit
    from grpo.learning.optimiser import Held
    from grpo.run import RunSpec
    from grpo.sampling import RolloutBatch

Array = jax.Array
LEAST_LEVEL = 1e-3


@dataclasses.dataclass(frozen=True)
class Rows:
    """One micro-batch at one noise level, and the velocities there. For pairs, rows alternate
    between a better video and a worse one, with one noise and one level for both.
    """

    x: Array  # [B, F, H, W, C] fp32, x_s
    x0: Array  # [B, F, H, W, C] fp32
    sigma: Array  # [B] fp32, s
    v: Array  # [B, F, H, W, C], of the trained weights
    v_lagged: dict[str, Array]  # the same of each copy of earlier weights, constant to the gradient
    v_reference: Array | None  # the same of the base model, where it is needed
    error: Array  # [B] fp32, mean((v - (e - x0))^2)
    target: Array  # [B, F, H, W, C], e - x0
    weight: Array  # [B] fp32, of `Selection`; [B / 2] for pairs


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FinishedBatch:
    """M micro-batches of one optimiser step, K noise levels a row. A row is a video, or a pair."""

    x0: Array  # [M, B, F, H, W, C] fp32, latents of the videos; of pairs the better ones
    worse: Array | None  # [M, B, F, H, W, C] fp32, the worse ones of pairs
    text: TextBatch  # arrays with a leading axis M
    video: Array  # [M, B] int32, the video's number in the epoch
    sigma: Array  # [M, K, B] fp32
    timestep: Array  # [M, K, B] fp32, 0..1000
    weight: Array  # [M, B] fp32, of `Selection`
    valid: Array  # [M, B] bool: False leaves a row out of the mean
    draw: Array  # [K] int32; noise is a function of (key, video, draw)
    key: Array  # of the epoch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FlowMetrics:
    """Sums over the counted rows, one shared count, so micro-batches can be added up exactly."""

    count: Array
    policy_loss: Array
    flow_error: Array  # mean((v - (e - x0))^2), of a pair the better one's
    kl: Array  # mean((v - v_reference)^2)
    more: dict[str, Array]  # what the method logs beside

    @classmethod
    def zero(cls, logged: Sequence[str]) -> "FlowMetrics":
        zero = jnp.zeros((), jnp.float32)
        return cls(zero, zero, zero, zero, dict.fromkeys(logged, zero))

    def averages(self) -> dict[str, float]:
        """Return the means for logging, on the host; 0 with no rows."""
        rows = max(float(self.count), 1.0)
        sums = {"policy_loss": self.policy_loss, "flow_error": self.flow_error, "kl": self.kl}
        return {name: float(value) / rows for name, value in (sums | self.more).items()}


@dataclasses.dataclass(frozen=True)
class Levels:
    """What each of N videos is noised to for one expert: K draws."""

    sigma: np.ndarray  # [N, K] fp32
    timestep: np.ndarray  # [N, K] fp32, what the model is fed, 0..1000
    draw: np.ndarray  # [K] int32, numbers of the draws, distinct between experts


@dataclasses.dataclass(frozen=True)
class FlowMatching(Method):
    """Base of the methods that train on finished videos.

    kl_weight: of mean((v - v_reference)^2), which is added to `loss`.
    """

    kl_weight: float = 0.0
    timesteps: int = 4  # noise levels a video and epoch, shared between the experts
    train_guided: bool = False  # train.guided

    logs: ClassVar[tuple[str, ...]] = ()  # names of the further values that `loss` returns
    reads: ClassVar[tuple[str, ...]] = ("train.timesteps", "train.guided")
    rollout_levels: ClassVar[bool] = False  # noise levels are the rollout's; else logit-normal

    def __post_init__(self):
        check_range(self, "kl_weight", least=0)

    # ---- what a method states ----------------------------------------------------------------
    @classmethod
    def settings(cls, recipe) -> dict:
        """Return the method's own fields from a recipe."""
        return {}

    @abc.abstractmethod
    def select(self, credit: "Credit", group_size: int) -> Selection:
        """Return the epoch's videos or pairs with their weights. `credit.spread` marks the videos
        that may be trained on; groups of `group_size` stand together.
        """

    @abc.abstractmethod
    def loss(self, rows: Rows) -> tuple[Array, dict[str, Array]]:
        """Return the loss of each row without the KL, and the values named in `logs`, [B] each."""

    @property
    def kl_copy(self) -> str | None:
        """The lagged copy that the KL is to; None: the base model."""
        return None

    # ---- what follows ------------------------------------------------------------------------
    @classmethod
    def check(cls, recipe) -> None:
        steps, timesteps = recipe.sample.steps, recipe.train.timesteps
        if timesteps > steps:
            raise UserError(
                f"config.train.timesteps={timesteps} must be at most sample.steps={steps}"
            )
        if recipe.sample.shared_noise:
            raise UserError(
                f"config.sample.shared_noise=True with train.method={cls.name}: without stochastic "
                "steps all videos of a group would be one; set it to False"
            )
        groups, updates = recipe.sample.groups, recipe.train.updates_per_epoch
        if cls.one_per_group and groups % updates:
            raise UserError(
                f"config.train.updates_per_epoch={updates} does not divide "
                f"sample.groups={groups}: train.method={cls.name} trains on one "
                f"{'pair' if cls.pairs else 'video'} of each group"
            )

    @classmethod
    def from_recipe(cls, recipe) -> "FlowMatching":
        train = recipe.train
        common = {
            "kl_weight": kl_weight(cls, recipe),
            "timesteps": train.timesteps,
            "train_guided": train.guided,
        }
        return cls(**common | cls.settings(recipe))

    @property
    def needs_reference(self) -> bool:
        return self.kl_weight > 0 and self.kl_copy is None

    @property
    def levels(self) -> int:
        return self.timesteps

    @property
    def guided(self) -> bool:
        return self.train_guided

    @property
    def passes(self) -> int:
        return 3 + self.needs_reference + len(self.lagged)

    def gradient_keys(self, spec: "RunSpec") -> tuple[float, ...]:
        return spec.sampling_guidance if self.guided else (1.0,) * len(spec.preset.experts)

    def make_gradient(self, policy: Policy, table, key: float) -> Callable:
        """key: the guidance of every velocity in the loss, up to 1 for none."""
        grad_fn = jax.grad(partial(objective, self, policy, key), has_aux=True)

        def gradient(trainable: Flat, held: "Held", frozen, batch: FinishedBatch):
            def one_draw(carry, level, rows):
                grads, metrics = grad_fn(trainable, held.lagged, frozen, *rows, *level, batch.key)
                return jax.tree.map(jnp.add, carry, (grads, metrics)), None

            def one_micro_batch(carry, micro):
                *rows, sigma, timestep = micro
                levels = (sigma, timestep, batch.draw)
                return jax.lax.scan(partial(one_draw, rows=rows), carry, levels)[0], None

            carry = (jax.tree.map(jnp.zeros_like, trainable), FlowMetrics.zero(self.logs))
            micro_batches = (
                batch.x0,
                batch.worse,
                batch.text,
                batch.video,
                batch.weight,
                batch.valid,
                batch.sigma,
                batch.timestep,
            )
            (grads, metrics), _ = jax.lax.scan(one_micro_batch, carry, micro_batches)
            return jax.tree.map(lambda g: g / jnp.maximum(metrics.count, 1.0), grads), metrics

        return gradient

    # ---- abstract arrays ---------------------------------------------------------------------
    def selected_layout(self, spec: "RunSpec") -> tuple[int, int]:
        """Return (M, B) of one optimiser step."""
        sample, settings = spec.recipe.sample, spec.settings
        rows = sample.groups if self.one_per_group else settings.videos
        shards = mesh_lib.batch_shards(spec.mesh)
        return layout(rows, spec.recipe.train.updates_per_epoch, sample.batch_size, shards)

    def batch_shapes(self, functions: "Functions", expert: int) -> FinishedBatch:
        spec = functions.spec
        m, b = self.selected_layout(spec)
        k = spec.trained_steps(expert)
        latents = functions.rows(jnp.float32, m, shape=spec.shape, batch=b)
        floats, bools = (jax.ShapeDtypeStruct((m, b), dtype) for dtype in (jnp.float32, bool))
        levels = jax.ShapeDtypeStruct((m, k, b), jnp.float32)
        return FinishedBatch(
            x0=latents,
            worse=latents if self.pairs else None,
            text=functions.text(m, batch=b),
            video=functions.rows(jnp.int32, m, batch=b),
            sigma=levels,
            timestep=levels,
            weight=floats,
            valid=bools,
            draw=jax.ShapeDtypeStruct((k,), jnp.int32),
            key=functions.random_key(),
        )

    def epoch_shapes(self, functions: "Functions") -> tuple:
        return (functions.latents(),) * functions.spec.settings.batches

    def rollout_passes(self, spec: "RunSpec", expert: int) -> float:
        m, b = self.selected_layout(spec)
        branches = 2 if spec.sampling_guidance[expert] > 1 and not self.guided else 1
        videos = spec.recipe.train.updates_per_epoch * m * b * (2 if self.pairs else 1)
        return videos / spec.recipe.sample.batch_size / branches

    # ---- an epoch's updates ------------------------------------------------------------------
    def batches(
        self,
        spec: "RunSpec",
        epoch: int,
        segment: int,
        rollout: "RolloutBatch",
        credit: "Credit",
        update: int,
    ) -> Iterator[tuple[np.ndarray, FinishedBatch, dict[str, float]]]:
        """Videos of groups without spread are masked; an update without any other is left out."""
        sample, train = spec.recipe.sample, spec.recipe.train
        shards = mesh_lib.batch_shards(spec.mesh)
        selection = self.select(credit, sample.group_size)
        updates = [
            selected
            for selected in selection.batches(train.updates_per_epoch, sample.batch_size, shards)
            if selected.valid.any()
        ]
        levels = self.noise_levels(
            seed=spec.recipe.seed,
            epoch=epoch,
            videos=spec.settings.videos,
            expert=spec.segments[segment].expert,
            segments=spec.segments,
            quotas=spec.windows.quotas,
            schedule=spec.schedule,
            boundary=spec.preset.boundary,
        )
        for number, selected in enumerate(updates, start=update + 1):
            texts = [rollout.texts(rollout.prompt_of[videos]) for videos in selected.videos]
            batch = stack(selected, rollout.finished, texts, levels, rollout.key, spec.mesh)
            yield selected.numbers, batch, self.share_kept(number, selected is updates[-1])

    def noise_levels(
        self,
        *,
        seed: int,
        epoch: int,
        videos: int,
        expert: int,
        segments: Sequence[Segment],
        quotas: Sequence[int],
        schedule: Schedule,
        boundary: float | None,
    ) -> Levels:
        """Return as many levels as the expert's quota, a function of (seed, epoch, expert, video,
        draw).

        The expert answers for timesteps from 1000 boundary up (expert 0) or below (expert 1). Draw
        j of K is from the j-th of K equal parts of the distribution, so that few draws cover it.
        With `rollout_levels` these are the rollout's steps, each as likely. Otherwise logit-normal,
        s = sigmoid(N(0, 1)) (Esser et al., arXiv 2403.03206), restricted to the expert's levels and
        to [1e-3, 1 - 1e-3].
        """
        at = next(i for i, segment in enumerate(segments) if segment.expert == expert)
        steps, count = segments[at].steps, quotas[at]
        draw = sum(quotas[:at]) + np.arange(count, dtype=np.int32)
        rng = Stream.NOISE_LEVEL.generator(seed, epoch, expert)
        share = (np.arange(count) + rng.random((videos, count))) / count  # from 0 to 1
        if self.rollout_levels:
            step = np.minimum(steps.start + (share * len(steps)).astype(int), steps.stop - 1)
            return Levels(schedule.sigmas[step], schedule.timesteps[step], draw)
        low, high = (0.0, 1.0) if boundary is None else ((boundary, 1.0), (0.0, boundary))[expert]
        low, high = max(low, LEAST_LEVEL), min(high, 1 - LEAST_LEVEL)
        normal = NormalDist()
        first, last = (normal.cdf(np.log(level / (1 - level))) for level in (low, high))
        quantile = np.vectorize(normal.inv_cdf)(first + share * (last - first))
        sigma = np.clip(1 / (1 + np.exp(-quantile)), low, high).astype(np.float32)
        return Levels(sigma, 1000 * sigma, draw)


def check_range(config, *names: str, least: float | None = None) -> None:
    """Raise ValueError where a field is not finite, or not above 0 (not at least `least`)."""
    for name in names:
        value = getattr(config, name)
        inside = 0 < value if least is None else least <= value
        if not (inside and value < float("inf")):
            bound = "above 0" if least is None else f"at least {least}"
            raise ValueError(f"train.{name}={value} must be finite and {bound}")


def mean_square(x: Array) -> Array:
    """Return the mean over all axes but B, [B] fp32."""
    return jnp.mean(jnp.square(x.astype(jnp.float32)), axis=tuple(range(1, x.ndim)))


def objective(
    method: FlowMatching,
    policy: Policy,
    guidance: float,
    trainable: Flat,
    lagged: dict[str, Flat],
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
) -> tuple[Array, FlowMetrics]:
    """Return the sum of the loss over the valid rows of one micro-batch at one draw, and metrics.

    The arrays from x0 on are those of `FinishedBatch` without their first axes: [B] and [B, ...].
    """
    noise = sample_noise(key, video, draw, x0.shape[1:])
    if worse is not None:  # one noise and one level for both of a pair
        x0, noise = pair(x0, worse), pair(noise, noise)
        sigma, timestep = pair(sigma, sigma), pair(timestep, timestep)
        text = dataclasses.replace(text, embeddings=pair(text.embeddings, text.embeddings))
    s = per_sample(sigma, x0)
    x, target = (1 - s) * x0 + s * noise, noise - x0

    def velocity_of(module):
        return velocity(module, x, timestep, text, guidance)

    v = velocity_of(policy.module(trainable, frozen))
    v_lagged = {
        name: jax.lax.stop_gradient(velocity_of(policy.module(weights, frozen)))
        for name, weights in lagged.items()
    }
    v_reference = None
    if method.needs_reference:
        v_reference = jax.lax.stop_gradient(velocity_of(policy.reference(frozen)))
    error = mean_square(v - target)
    v_kl = v_reference if method.kl_copy is None else v_lagged[method.kl_copy]
    kl = jnp.zeros_like(error) if v_kl is None else kl_to_reference(v, v_kl, None, kind="velocity")

    loss, more = method.loss(Rows(x, x0, sigma, v, v_lagged, v_reference, error, target, weight))
    if worse is not None:
        error, kl = error[::2], kl[::2]
    if method.kl_weight:
        loss = loss + method.kl_weight * kl

    def total(values):
        return jnp.sum(jnp.where(valid, values, 0.0))

    more = {name: total(more[name]) for name in method.logs}
    metrics = FlowMetrics(total(1.0), total(loss), total(error), total(kl), more)
    return total(loss), jax.lax.stop_gradient(metrics)


def gather(latents: Sequence[Array], videos: np.ndarray, mesh: jax.sharding.Mesh) -> Array:
    """Return the latents of videos [M, B], [M, B, ...] fp32. latents: the rollout's batches, in
    order.
    """
    sharding, size = sharding_lib.batch_sharding(mesh), len(latents[0])

    def batch(row):
        whole = len(row) == size and row[0] % size == 0
        if whole and np.array_equal(row, row[0] + np.arange(size)):
            return latents[row[0] // size]  # as it was sampled
        numbers = sharding_lib.place(row.astype(np.int32), sharding_lib.replicated(mesh))
        return branch(latents, numbers, sharding)

    return jnp.stack([batch(row) for row in videos])


def stack(
    selected: Selection,
    latents: Sequence[Array],
    texts: Sequence[TextBatch],
    levels: Levels,
    epoch_key: Array,
    mesh: jax.sharding.Mesh,
) -> FinishedBatch:
    """Return one optimiser step's batch.

    selected: one of `Selection.batches`; latents: the rollout's; texts: one a micro-batch.
    """
    sharding = sharding_lib.batch_sharding(mesh)
    sigma, timestep = (
        jnp.asarray(np.moveaxis(x[selected.videos], -1, 1)) for x in (levels.sigma, levels.timestep)
    )
    video = [sharding_lib.place(row.astype(np.int32), sharding) for row in selected.videos]
    return FinishedBatch(
        x0=gather(latents, selected.videos, mesh),
        worse=None if selected.worse is None else gather(latents, selected.worse, mesh),
        text=jax.tree.map(lambda *leaves: jnp.stack(leaves), *texts),
        video=jnp.stack(video),
        sigma=sigma,
        timestep=timestep,
        weight=jnp.asarray(selected.weight),
        valid=jnp.asarray(selected.valid),
        draw=jnp.asarray(levels.draw),
        key=Stream.RENOISING.key(epoch_key),
    )

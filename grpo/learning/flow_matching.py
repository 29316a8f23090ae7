"""Base of the methods that train on finished videos, noised again, such as NFT and DPO.

They need no log-probs, so the rollout is the plain ODE. Its final latents x0 are noised again,
x_s = (1 - s) x0 + s e, at newly drawn noise levels s (papers write t), and the loss compares
velocities at x_s; the true velocity is e - x0. The rollout uses guidance as configured. Training
uses the conditional velocity without guidance, DiffusionNFT's published form, or with train.guided
the guided velocity of the rollout.

A method derives from `FlowMatching` and defines the videos that it trains on (`select`), its loss
(`loss`), and the earlier weights that it compares with (`lagged`).
"""

import abc
import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from grpo.learning import abstract
from grpo.learning.finished_batch import FinishedBatch, Levels, levels_at, stack
from grpo.learning.method import Method, largest_kl_weight
from grpo.learning.policy import Policy
from grpo.learning.selection import Selection, layout
from grpo.learning.velocity_loss import Rows, make_gradient
from grpo.random_streams import Stream
from wan_jax.distributed import mesh as mesh_lib
from wan_jax.errors import UserError

if TYPE_CHECKING:
    from grpo.compiled.run_arrays import RunArrays
    from grpo.credit import Credit
    from grpo.run import RunSpec
    from grpo.sampling import RolloutBatch
    from grpo.settings.schema import Recipe

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class FlowMatching(Method):
    """Base of the methods that train on finished videos.

    Attributes:
        kl_weight: weight of mean((v - v_reference)^2), which is added to `loss`; the largest one
            where it changes (`GradientInputs.kl_weight`).
        timesteps: number of noise levels of a video in an epoch, shared between the experts.
        train_guided: train.guided.
        kl_outside: train.box_kl.

    Class attributes:
        logs: names of the further values that `loss` returns.
        levels_part: the part of the distribution of the noise levels that is trained, from its start:
            with `rollout_levels` from the highest level on.
    """

    kl_weight: float = 0.0
    timesteps: int = 4
    train_guided: bool = False
    kl_outside: bool = False

    logs: ClassVar[tuple[str, ...]] = ()
    levels_part: ClassVar[float] = 1.0
    loss_has_kl = True
    reads: ClassVar[tuple[str, ...]] = ("train.timesteps", "train.guided")
    rollout_levels: ClassVar[bool] = False

    def __post_init__(self):
        check_range(self, "kl_weight", least=0)

    # ---- the definition of a method ----------------------------------------------------------
    @classmethod
    def settings(cls, recipe: "Recipe") -> dict:
        """Return the values of the fields that a subclass adds, from a recipe."""
        return {}

    @abc.abstractmethod
    def select(self, credit: "Credit", group_size: int) -> Selection:
        """Return the epoch's videos or pairs with their weights. `credit.spread` marks the videos
        that may be trained on. The videos of a group, `group_size` of them, have consecutive
        numbers.
        """

    @abc.abstractmethod
    def loss(self, rows: Rows) -> tuple[Array, dict[str, Array]]:
        """Return the loss of each row without the KL, and the values named in `logs`, [B] each."""

    @property
    def kl_copy(self) -> str | None:
        """The name of the lagged copy that is the reference of the KL; None: the base model is."""
        return None

    # ---- the members of `Method` -------------------------------------------------------------
    @classmethod
    def check(cls, recipe: "Recipe") -> None:
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
        if cls.one_per_group and groups % updates and not recipe.data.only:
            raise UserError(
                f"config.train.updates_per_epoch={updates} does not divide "
                f"sample.groups={groups}: train.method={cls.name} trains on one "
                f"{'pair' if cls.pairs else 'video'} of each group"
            )

    @classmethod
    def from_recipe(cls, recipe: "Recipe") -> "FlowMatching":
        train = recipe.train
        common = {
            "kl_weight": largest_kl_weight(cls, recipe),
            "timesteps": train.timesteps,
            "train_guided": train.guided,
            "kl_outside": train.box_kl,
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
        """Return the gradient of `objective`. key: the guidance of all velocities in the loss; up to
        1 there is none.
        """
        return make_gradient(self, policy, key)

    # ---- abstract arrays ---------------------------------------------------------------------
    def selected_layout(self, spec: "RunSpec") -> tuple[int, int]:
        """Return (M, B) of one optimiser step."""
        sample, settings = spec.recipe.sample, spec.settings
        rows = sample.groups if self.one_per_group else settings.videos
        shards = mesh_lib.batch_shards(spec.mesh)
        return layout(rows, spec.recipe.train.updates_per_epoch, sample.batch_size, shards)

    def batch_shapes(self, arrays: "RunArrays", expert: int) -> FinishedBatch:
        spec = arrays.spec
        m, b = self.selected_layout(spec)
        k = spec.trained_steps(expert)
        latents = arrays.rows(jnp.float32, m, shape=spec.shape, batch=b)
        levels = abstract.array((m, k, b), jnp.float32)
        cells = None
        if spec.recipe.train.box_credit:
            cells = arrays.rows(jnp.float32, m, shape=(*spec.shape[:-1], 1), batch=b)
        return FinishedBatch(
            x0=latents,
            worse=latents if self.pairs else None,
            text=arrays.text(m, batch=b),
            video=arrays.rows(jnp.int32, m, batch=b),
            sigma=levels,
            timestep=levels,
            weight=abstract.array((m, b), jnp.float32),
            valid=abstract.array((m, b), bool),
            draw=abstract.array((k,), jnp.int32),
            key=arrays.random_key(),
            cells=cells,
            worse_cells=cells if self.pairs else None,
            kl_gate=None
            if spec.recipe.train.kl_gate is None
            else abstract.array((m, b), jnp.float32),
        )

    def epoch_shapes(self, arrays: "RunArrays") -> tuple:
        return (arrays.latents(),) * arrays.spec.settings.batches

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
        """Yield the batches. Videos of groups with equal rewards are masked, and an update in which
        all are masked is left out.
        """
        sample, train = spec.recipe.sample, spec.recipe.train
        shards = mesh_lib.batch_shards(spec.mesh)
        selection = self.select(credit, sample.group_size)
        updates = [
            selected
            for selected in selection.batches(train.updates_per_epoch, sample.batch_size, shards)
            if selected.valid.any()
        ]
        levels = self.noise_levels(spec, epoch, segment)
        cells = credit.cell_weights(spec, rollout.frames)
        for number, selected in enumerate(updates, start=update + 1):
            texts = [rollout.texts(rollout.prompt_of[videos]) for videos in selected.videos]
            batch = stack(
                selected, rollout.finished, texts, levels, rollout.key, spec.mesh, cells=cells
            )
            if credit.kl_gate is not None:
                gate = jnp.asarray(credit.kl_gate[selected.videos])
                batch = dataclasses.replace(batch, kl_gate=gate)
            yield selected.numbers, batch, self.share_kept(number, selected is updates[-1])

    def noise_levels(self, spec: "RunSpec", epoch: int, segment: int) -> Levels:
        """Return the noise levels of the videos of an epoch for the expert of a segment. Their number
        is the segment's quota. They are a function of (seed, epoch, expert, video, draw).

        Draw j of K is from the j-th of K equal parts of the distribution (`levels_at`), so that few
        draws cover it.
        """
        expert, quotas = spec.segments[segment].expert, spec.windows.quotas
        count = quotas[segment]
        draw = sum(quotas[:segment]) + np.arange(count, dtype=np.int32)
        rng = Stream.NOISE_LEVEL.generator(spec.recipe.seed, epoch, expert)
        uniform = rng.random((spec.settings.videos, count))
        share = self.levels_part * (np.arange(count) + uniform) / count  # from 0 to 1
        return Levels(*self.levels_at(spec, segment, share), draw)

    def levels_at(
        self, spec: "RunSpec", segment: int, share: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the noise levels at these shares of their distribution, and the timesteps there, as
        `finished_batch.levels_at`.
        """
        return levels_at(spec, segment, share, self.rollout_levels)


def check_range(config, *names: str, least: float | None = None) -> None:
    """Raise ValueError where a field is not finite, or not above 0; with `least`, not at least
    that. names: of the fields, which are those of settings in the section `train`.
    """
    for name in names:
        value = getattr(config, name)
        inside = 0 < value if least is None else least <= value
        if not (inside and value < float("inf")):
            bound = "above 0" if least is None else f"at least {least}"
            raise ValueError(f"train.{name}={value} must be finite and {bound}")

"""What a training method is: everything in which methods differ, behind one class.

A method is one file in `grpo/methods/`, named as `train.method` names it, with a class `METHOD`.
Most derive from `grpo.learning.flow_matching.FlowMatching`, which trains on finished videos and asks
a new method for little more than its loss. Nothing outside of `grpo/methods/` asks which method runs:

    check           refuses a recipe's settings that do not go together
    from_recipe     builds the method from a recipe
    lagged, sampler which copies of earlier weights the run keeps, and whether one of them samples
    keeps_steps     whether a rollout keeps its stochastic steps, or only the finished latents
    make_gradient   the gradient of one optimiser step, to be jitted
    batches         what the optimiser steps of an epoch train on, from its rewards
"""

import abc
import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

if TYPE_CHECKING:
    from grpo.compiled.functions import Functions
    from grpo.credit import Credit
    from grpo.learning.kl import AdaptiveKL
    from grpo.learning.policy import Policy
    from grpo.rollout import StepTable
    from grpo.run import RunSpec
    from grpo.sampling import RolloutBatch


@dataclasses.dataclass(frozen=True)
class Method(abc.ABC):
    """A training method with its settings. Subclasses add fields, and `METHOD` names the class."""

    name: ClassVar[str]
    default_kl_weight: ClassVar[float] = 0.0  # where train.kl_weight is None
    reads: ClassVar[tuple[str, ...]] = ()  # settings that only some methods read, and this one does
    variants: ClassVar[tuple[str, ...]] = ()  # settings that choose a variant of this method
    on_advantages: ClassVar[bool] = False  # else it ranks videos by their rewards themselves
    keeps_steps: ClassVar[bool] = False
    importance: ClassVar[bool] = False  # whether each step counts by what it brought the video
    pairs: ClassVar[bool] = False  # whether a row of a batch is a better and a worse video
    one_per_group: ClassVar[bool] = False  # whether it trains on one row of each group

    @classmethod
    def check(cls, recipe) -> None:
        """Raise `UserError` where settings do not go together under this method."""
        return None

    @classmethod
    @abc.abstractmethod
    def from_recipe(cls, recipe) -> "Method":
        """Return the method of a checked recipe. Raises ValueError, naming key and value."""

    # ---- weights -----------------------------------------------------------------------------
    @property
    def lagged(self) -> tuple[str, ...]:
        """Names of the copies of earlier weights that the run's state keeps."""
        return ()

    @property
    def sampler(self) -> str | None:
        """The copy that samples an epoch's videos; None: the trained weights."""
        return None

    def share_kept(self, update: int, last: bool) -> dict[str, float]:
        """Return how much of itself each copy keeps in an optimiser step: 1, it stays as it is; 0,
        it becomes the new weights. update: the run's, from 1; last: of its epoch.
        """
        return {}

    @property
    def needs_reference(self) -> bool:
        """Whether the base model's velocity is computed, beside that of the trained weights."""
        return False

    @property
    def adaptive_kl(self) -> "AdaptiveKL | None":
        """How the weight of the KL adapts; None: it stays."""
        return None

    # ---- the rollout -------------------------------------------------------------------------
    @property
    def levels(self) -> int | None:
        """Noise levels that each video is trained at; None: its stochastic steps are trained."""
        return None

    @property
    def keeps_mean(self) -> bool:
        """Whether the rollout keeps the mean of each stochastic step."""
        return False

    @property
    def keeps_latents(self) -> bool:
        """Whether the epoch keeps its finished latents."""
        return not self.keeps_steps

    @property
    def sampling_kl(self) -> str | None:
        """The kind of KL that is measured while sampling, as part of the reward; None: none."""
        return None

    @property
    def guided(self) -> bool:
        """Whether the trained velocity has guidance where the rollout has it."""
        return True

    # ---- the update --------------------------------------------------------------------------
    @property
    @abc.abstractmethod
    def passes(self) -> int:
        """Forward passes that one row of an update is worth: three of the policy, one of each
        other model.
        """

    @abc.abstractmethod
    def gradient_keys(self, spec: "RunSpec") -> tuple[Any, ...]:
        """Return, for each expert, what its gradient depends on: equal ones share a function."""

    @abc.abstractmethod
    def make_gradient(self, policy: "Policy", table: "StepTable", key: Any) -> Callable:
        """Return (trainable, `update.Held`, frozen, batch) -> (mean gradient, metrics), where
        metrics has `count`, `kl` and `averages()`.
        """

    @abc.abstractmethod
    def batch_shapes(self, functions: "Functions", expert: int) -> Any:
        """Return the abstract batch of one optimiser step of an expert."""

    @abc.abstractmethod
    def epoch_shapes(self, functions: "Functions") -> tuple:
        """Return what an epoch's rollout leaves on the devices, as abstract arrays."""

    def step_shapes(self, functions: "Functions") -> list:
        """Return what a batch under way keeps of its steps, as abstract arrays."""
        return []

    @abc.abstractmethod
    def rollout_passes(self, spec: "RunSpec", expert: int) -> float:
        """Return how many of the rollout's forward passes of a batch one forward of all an epoch's
        updates is worth, for each of the expert's steps.
        """

    @abc.abstractmethod
    def batches(
        self,
        spec: "RunSpec",
        epoch: int,
        segment: int,
        rollout: "RolloutBatch",
        credit: "Credit",
        update: int,
    ) -> Iterator[tuple[np.ndarray, Any, dict[str, float]]]:
        """Yield, for each optimiser step of the expert of a segment, the numbers of the videos that
        count, the batch, and `share_kept`. update: how many the expert has made so far.
        """

    def check_first(self, values: dict[str, float], epoch: int) -> dict[str, float]:
        """Return further values to log of an expert's first update of an epoch. Raises `UserError`
        where they show that rollout and update disagree.
        """
        return {}

    def log_sampled(self, rollout: "RolloutBatch", expert: str, videos: range) -> dict[str, float]:
        """Return values to log of every update that were measured while sampling."""
        return {}

    def warning(self, record: dict) -> str | None:
        """Return what to say of an epoch's record, or None."""
        return None


def kl_weight(method: type[Method], recipe) -> float:
    """Return `train.kl_weight`, or the method's own default where that is None."""
    weight = recipe.train.kl_weight
    return method.default_kl_weight if weight is None else weight

"""The interface of a training method: everything in which methods differ.

A method is one file in `grpo/methods/`, with the name that `train.method` has and a class `METHOD`.
Most derive from `grpo.learning.flow_matching.FlowMatching`, which trains on finished videos and
leaves little more than the loss to a new method. No code outside of `grpo/methods/` depends on the
name of the method. The main members:

    check            refuses settings that contradict each other
    from_recipe      builds the method from a recipe
    lagged, sampler  the copies of earlier weights that a run keeps, and the one that samples
    keeps_steps      whether a rollout keeps its stochastic steps, or only the final latents
    make_gradient    the gradient of one optimiser step, to be jitted
    batches          the batches of an epoch's optimiser steps, from the credit of its videos
"""

import abc
import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

if TYPE_CHECKING:
    from grpo.compiled.run_arrays import RunArrays
    from grpo.credit import Credit
    from grpo.learning.kl import AdaptiveKL
    from grpo.learning.policy import Policy
    from grpo.learning.step_table import StepTable
    from grpo.run import RunSpec
    from grpo.sampling import RolloutBatch
    from grpo.settings.schema import Recipe


@dataclasses.dataclass(frozen=True)
class Method(abc.ABC):
    """A training method with its settings, which subclasses declare as fields.

    Class attributes:
        name: the value of train.method, and the name of the file.
        default_kl_weight: where train.kl_weight is None.
        loss_has_kl: whether the logged `policy_loss` includes the weighted KL.
        reads: keys of the settings that this method reads, but not every method.
        variants: keys of the settings that choose a variant of this method.
        on_advantages: whether it trains on advantages, not on ranks of rewards.
        keeps_steps: whether the rollout keeps its stochastic steps.
        pairs: whether a row of a batch is a pair of a better and a worse video.
        one_per_group: whether it trains on one row of each group.
        has_ratio: whether the loss has an importance ratio to the policy that sampled.
        rollout_levels: whether noise levels of finished videos and of data are those of the rollout's
            steps, not logit-normal.
        of_data: what it trains on with data.only: ITEMS, PAIRS or RATINGS of `grpo.data.labels`;
            None: it cannot train on data alone.
        distances: logged means of squared differences of velocities that
            train.max_velocity_distance bounds.
    """

    name: ClassVar[str]
    default_kl_weight: ClassVar[float] = 0.0
    loss_has_kl: ClassVar[bool] = False
    reads: ClassVar[tuple[str, ...]] = ()
    variants: ClassVar[tuple[str, ...]] = ()
    on_advantages: ClassVar[bool] = False
    keeps_steps: ClassVar[bool] = False
    pairs: ClassVar[bool] = False
    one_per_group: ClassVar[bool] = False
    has_ratio: ClassVar[bool] = False
    rollout_levels: ClassVar[bool] = True
    of_data: ClassVar[str | None] = None
    distances: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def check(cls, recipe: "Recipe") -> None:
        """Raise `UserError` where settings contradict each other under this method."""
        return

    @classmethod
    @abc.abstractmethod
    def from_recipe(cls, recipe: "Recipe") -> "Method":
        """Return the method with the settings of a checked recipe. Raises ValueError with the key
        and the value of a setting that the method cannot have.
        """

    # ---- weights -----------------------------------------------------------------------------
    @property
    def lagged(self) -> tuple[str, ...]:
        """The names of the copies of earlier weights in the run's state."""
        return ()

    @property
    def sampler(self) -> str | None:
        """The name of the copy that samples the videos; None: the trained weights sample."""
        return None

    def share_kept(self, update: int, last: bool) -> dict[str, float]:
        """Return the share of itself that each lagged copy keeps in an optimiser step, by name. 1: it
        does not change. 0: it becomes the new weights.

        update: number of the optimiser step in the run, from 1. last: whether it is the last one of
        its epoch.
        """
        return {}

    @property
    def needs_reference(self) -> bool:
        """Whether training computes the velocity of the base model."""
        return False

    @property
    def adaptive_kl(self) -> "AdaptiveKL | None":
        """The rule by which the weight of the KL adapts; None: it is constant."""
        return None

    # ---- the rollout -------------------------------------------------------------------------
    @property
    def levels(self) -> int | None:
        """Number of noise levels at which each video is trained; None: its stochastic steps are
        trained.
        """
        return None

    @property
    def keeps_mean(self) -> bool:
        """Whether the rollout keeps the mean of each stochastic step."""
        return False

    @property
    def keeps_latents(self) -> bool:
        """Whether the epoch keeps its final latents."""
        return not self.keeps_steps

    @property
    def importance(self) -> bool:
        """Whether each step is weighted by the progress of the video in it."""
        return False

    @property
    def sampling_kl(self) -> str | None:
        """The kind of KL that is measured while sampling, as part of the reward; None: no KL is
        measured then.
        """
        return None

    @property
    def guided(self) -> bool:
        """Whether the trained velocity has guidance where the rollout has it."""
        return True

    # ---- the update --------------------------------------------------------------------------
    @property
    @abc.abstractmethod
    def passes(self) -> int:
        """The cost of one row of an update, in forward passes: three for the policy, forward and
        backward, and one for each other model.
        """

    @abc.abstractmethod
    def gradient_keys(self, spec: "RunSpec") -> tuple[Any, ...]:
        """Return the values that the gradient of each expert depends on. Experts with equal values
        share a function.
        """

    @abc.abstractmethod
    def make_gradient(self, policy: "Policy", table: "StepTable", key: Any) -> Callable:
        """Return the function (trainable, `optimiser.GradientInputs`, frozen, batch) -> (mean
        gradient, metrics). The metrics have `count`, `kl` and `averages()`.

        key: one of `gradient_keys`.
        """

    @abc.abstractmethod
    def batch_shapes(self, arrays: "RunArrays", expert: int) -> Any:
        """Return the abstract batch of one optimiser step of an expert."""

    @abc.abstractmethod
    def epoch_shapes(self, arrays: "RunArrays") -> tuple:
        """Return the arrays that the rollout of an epoch leaves on the devices, abstract."""

    def waiting_shapes(self, arrays: "RunArrays", expert: int) -> tuple:
        """Return those of `epoch_shapes` that are still on the devices in the first optimiser step of
        an expert, beside its batch.
        """
        return arrays.trajectories

    @abc.abstractmethod
    def rollout_passes(self, spec: "RunSpec", expert: int) -> float:
        """Return the cost of one forward pass of all rows of an epoch's updates at one step or noise
        level of an expert, in the rollout's forward passes of a batch.
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
        """Yield (numbers of the videos that count, batch, `share_kept`) for each optimiser step of
        the expert of a segment. update: number of optimiser steps of the expert so far.
        """

    def rated_weights(self, scores: np.ndarray) -> np.ndarray:
        """Return the weights of the rows of rated data, float32 [N], where `of_data` is RATINGS.
        scores: float64 [N], of all rated items.
        """
        raise NotImplementedError

    def check_first(self, values: dict[str, float], epoch: int) -> dict[str, float]:
        """Return further values to log of an expert's first update of an epoch. Raises `UserError`
        where its values show that rollout and update disagree.
        """
        return {}

    def log_sampled(self, rollout: "RolloutBatch", expert: str, videos: range) -> dict[str, float]:
        """Return values of `videos` that were measured while sampling, to log with every update."""
        return {}

    def warning(self, record: dict) -> str | None:
        """Return a warning about the record of an epoch's updates, or None."""
        return None


def kl_weight(method: type[Method], recipe: "Recipe") -> float:
    """Return `train.kl_weight`, or the method's default where that is None."""
    weight = recipe.train.kl_weight
    return method.default_kl_weight if weight is None else weight


def largest_kl_weight(method: type[Method], recipe: "Recipe") -> float:
    """Return the largest weight that the KL may have in a run: the one of an alarm, where that raises
    it, else `kl_weight`. If it is 0, the loss has no KL.
    """
    train = recipe.train
    return train.alarm_kl if train.on_alarm == "kl" else kl_weight(method, recipe)

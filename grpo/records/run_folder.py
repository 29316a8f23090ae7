"""The folder of a run: its checkpoints, its lock, and what its evaluations say."""

import dataclasses

from grpo.learning import train_state
from grpo.learning.head_guidance import HeadState
from grpo.learning.method import kl_weight
from grpo.records import run_log
from grpo.run import RunSpec
from grpo.sampling import States
from grpo.scoring import guard
from grpo.settings.budget import Spent
from wan_jax.storage import folder_lock
from wan_jax.storage.checkpoint import Checkpoints


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """The folder of a run, which is locked by this run.

    Attributes:
        spec: the description of the run.
        checkpoints: its checkpoints.
        origin: digests of the run's model and prompts (`train_state.origin`).
        lock: of the folder, in process 0; None in the others.
    """

    spec: RunSpec
    checkpoints: Checkpoints
    origin: dict
    lock: folder_lock.Lock | None

    def check_held(self) -> None:
        """Raise `UserError` where the folder was moved away or taken by another run."""
        if self.lock:
            self.lock.check_held()

    def verdicts(self) -> list[guard.Verdict]:
        """Return what the guard says of the run's evaluations, oldest first."""
        recipe = self.spec.recipe
        evaluations = run_log.read_evaluations(recipe.run_dir)
        epochs = run_log.read_metrics(recipe.run_dir)
        return guard.judge(evaluations, guard.Limits.of(recipe.to_dict()), epochs)

    def mark_best(self) -> None:
        """Mark the checkpoint that the guard finds best, so that it is kept."""
        recipe, verdicts = self.spec.recipe, self.verdicts()
        chosen = guard.best(verdicts)
        if recipe.save.best and chosen and chosen.epoch in self.checkpoints.epochs():
            why = guard.explain(verdicts, run_log.read_evaluations(recipe.run_dir))
            self.checkpoints.mark_best(chosen.epoch, why)

    def alarm(self, epoch: int) -> str:
        """Return the guard's alarm on the evaluation after an epoch, "" without one."""
        return next((verdict.alarm for verdict in self.verdicts() if verdict.epoch == epoch), "")

    def kl_weight(self) -> float | None:
        """Return the next epoch's weight of the KL, where the guard sets it, else None."""
        recipe = self.spec.recipe
        if recipe.train.on_alarm != "kl":
            return None
        if guard.kl_is_raised(self.verdicts(), recipe.train.alarm_calm):
            return recipe.train.alarm_kl
        return kl_weight(type(self.spec.method), recipe)

    def check_space(self, states: States, head: HeadState | None = None) -> None:
        """Raise `UserError` where the disk does not have the space of the next checkpoint, before an epoch
        is computed that could not be saved.
        """
        self.checkpoints.check_space(train_state.state_tree(states, head), "the next checkpoint")

    def save(self, epoch: int, states: States, spent: Spent, head: HeadState | None = None) -> None:
        """Write the checkpoint of an epoch, unless the newest one is of this epoch. Raises
        `UserError` as `check_held` does. head: that guides the rollout.
        """
        if self.checkpoints.latest() == epoch:
            return
        self.check_held()
        recipe, lora = self.spec.recipe, self.spec.settings.lora
        train_state.save(
            self.checkpoints, epoch, states, recipe.to_dict(), lora, spent, self.origin, head
        )

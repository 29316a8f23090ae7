"""What a run does on the guard's alarm: it stops, or the weight of its KL is raised."""

from grpo.learning.head_guidance import HeadState
from grpo.records.console import print_once
from grpo.sampling import States
from grpo.settings.budget import Spent
from grpo.setup import Start
from wan_jax.distributed import multihost
from wan_jax.errors import UserError


def stop_on_alarm(
    start: Start, states: States, epoch: int, spent: Spent, head: HeadState | None
) -> None:
    """Raise `UserError` where the last evaluation, after this epoch, raised an alarm on which the run
    is to stop. Everything is saved before. head: that guides the rollout.
    """
    recipe, folder = start.session.spec.recipe, start.folder
    if recipe.train.on_alarm != "stop":
        return
    alarm = multihost.from_first(lambda: folder.alarm(epoch))
    if alarm:
        folder.save(epoch, states, spent, head)
        best = multihost.from_first(folder.checkpoints.best)
        found = "" if best is None else f"The best checkpoint is {folder.checkpoints.path(best)}. "
        raise UserError(
            f"epoch {epoch}: {alarm}, so the run stops, as train.on_alarm=stop asks. Epoch {epoch} is "
            f"saved. {found}To continue anyway: --config.train.on_alarm=log"
        )


def weight_of_kl(start: Start, epoch: int, before: float | None) -> float | None:
    """Return the weight of the KL after an epoch, where the guard sets it (train.on_alarm=kl), else
    None. A change is printed. before: the weight so far; None where the run starts or continues.
    """
    weight = multihost.from_first(start.folder.kl_weight)
    raised = weight == start.session.spec.recipe.train.alarm_kl
    if weight != before and (raised or before is not None):
        why = "raised by the alarm" if raised else "the alarm is over"
        print_once(f"epoch {epoch}: the weight of the KL is {weight:g} from now on, {why}")
    return weight

"""The evaluations of a run while it trains: when one is due, what it records and needs."""

from typing import TYPE_CHECKING

from grpo.records import run_log
from grpo.records.clock import timestamp
from grpo.records.console import print_once, progress_bar
from grpo.run import RunSpec
from grpo.sampling import States, averaged_weights
from grpo.scoring import reward_combination
from grpo.scoring.heldout import Evaluation, format_evaluation
from grpo.settings.budget import Spent
from wan_jax.distributed import multihost
from wan_jax.errors import UserError

if TYPE_CHECKING:
    from grpo.setup import Start


def evaluation_is_due(spec: RunSpec, epoch: int, spent: Spent) -> bool:
    """Return whether the weights after an epoch are evaluated."""
    recipe = spec.recipe
    last = epoch == recipe.epochs or spec.settings.budget.reached(spent)
    return last or epoch % recipe.eval.every == 0


def not_evaluated(run_dir: str, epoch: int, every: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """Return the series of which the run's folder has no evaluation after `epoch`. every: all series
    (`RunSpec.evaluations`).
    """
    missing = []
    for i, series in enumerate(every):
        known = run_log.read_evaluations(run_dir, series if i else None)
        if epoch not in [record["epoch"] for record in known]:
            missing.append(series)
    return tuple(missing)


def evaluate(start: "Start", states: States, epoch: int, due: tuple[int | str, ...]) -> None:
    """Evaluate the moving average after an epoch, and record the results. due: of
    `RunSpec.evaluations`.
    """
    session, spec = start.session, start.session.spec
    for series in due:
        result = start.evaluators[series](
            lambda expert: averaged_weights(session, states, expert),
            epoch,
            lambda batches, **options: progress_bar(batches, desc="evaluation", **options),
        )
        is_main = series == spec.evaluations[0]  # the run is judged by this one
        start.folder.check_held()
        if epoch == 0 and is_main:
            check_base(result, spec.settings.weights)
        record = result.record | {"time": timestamp()}
        start.log.evaluation(record, result.videos, None if is_main else series)
        label = spec.label(series)
        print_once(f"epoch {epoch}: held-out {format_evaluation(result.record)}{label}")
        if result.warning:
            print_once(result.warning)
        if is_main and multihost.first():
            start.folder.mark_best()
            if alarm := start.folder.alarm(epoch):
                print_once(f"alarm: {alarm}")


def check_base(result: Evaluation, weights: dict[str, float]) -> None:
    """Raise `UserError` where the first evaluation lacks a measure of quality with which later videos
    are compared. The evaluation is not recorded then, so the same command makes it again.
    """
    missing = reward_combination.without_base(weights, result.record.get("measures", {}))
    if missing:
        raise UserError(
            f"epoch 0: the evaluation of the starting model measured {', '.join(missing)} for "
            "fewer than two videos, and the quality of later videos is compared with it; "
            f"{result.why}. The same command measures it again; without "
            f"config.reward.weights.{missing[0]} a new run does not need it"
        )


def read_base(run_dir: str, weights: dict[str, float]) -> reward_combination.Base:
    """Return the measures of quality of the first evaluation. Raises `UserError` where the run's
    folder no longer has one that is needed.
    """
    first = run_log.read_evaluations(run_dir)[:1]
    measures = first[0].get("measures", {}) if first and first[0]["epoch"] == 0 else {}
    missing = reward_combination.without_base(weights, measures)
    if missing:
        raise UserError(
            f"{run_dir}/{run_log.EVALUATIONS} has no evaluation of epoch 0 with "
            f"{', '.join(missing)}, with which the quality of later videos is compared; start a new "
            "run with another --config.run_dir"
        )
    return measures

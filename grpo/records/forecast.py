"""What a run will take, printed before its first epoch."""

from grpo.compiled.costs import epochs_in_evaluations
from grpo.records.progress import estimate, forecast
from grpo.records.run_log import RunLog, SilentLog
from grpo.run import RunSpec


def forecast_lines(spec: RunSpec, log: RunLog | SilentLog) -> list[str]:
    """Return a line with the time that the rest of a run will take, by its last epochs, or by the first
    evaluation before there are any; [] where nothing was timed. The first evaluation also starts the
    scoring, seconds that count here as if every epoch had them.
    """
    epochs, evaluations, config = [*log.epochs], [*log.evaluations], spec.recipe.to_dict()
    if epochs:
        progress, source = estimate(epochs, evaluations, config), ", by its last epochs"
    else:
        videos = 0 if spec.recipe.data.only else spec.settings.videos
        sampled = videos * spec.recipe.sample.steps
        cost = epochs_in_evaluations(spec)
        progress = forecast(cost, sampled, evaluations, config)
        source = " or less, by the first evaluation"
    if not progress.eta:
        return []
    return [f"the run takes about {progress.eta}{source}; refined after every epoch"]

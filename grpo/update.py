"""The optimiser steps of an epoch."""

import math
from collections.abc import Sequence

from grpo.credit import Credit
from grpo.records.run_log import EXPERTS
from grpo.sampling import RolloutBatch, Session, States
from wan_jax.errors import UserError

# what an epoch logs of several updates' values, where that is not mean, minimum and maximum
BOUNDS = {"ratio_min": min, "ratio_max": max, "ratio_max_error": max}


def update_epoch(
    session: Session, states: States, epoch: int, rollout: RolloutBatch, credit: Credit
) -> tuple[States, dict]:
    """Return the states after an epoch's optimiser steps, and what they measured.

    The record is `summary` of all steps, how many videos they were from (`videos_trained`), and
    where two experts are trained each one's summary under `EXPERTS`. The expert that is on the
    device goes first, so that the next epoch finds the first one there. The states that are given
    are donated. Raises `UserError` where an update is not finite, or where rollout and update
    disagree.
    """
    spec, method, states = session.spec, session.spec.method, dict(states)
    measured: dict[str, list[dict[str, float]]] = {}  # by expert, of each of its steps
    trained: set[int] = set()  # numbers of videos
    for i, segment in reversed(list(enumerate(spec.segments))):
        expert, name = segment.expert, spec.preset.experts[segment.expert]
        if name not in states:
            continue
        steps = measured.setdefault(name, [])
        sampled = method.log_sampled(rollout, name, spec.windows.videos(i))
        made = int(states[name].updates)
        for videos, batch, share_kept in method.batches(spec, epoch, i, rollout, credit, made):
            states[name], metrics, norms = session.functions.updates[expert](
                states[name], session.frozen(expert), batch, share_kept
            )
            values = metrics.averages() | {key: float(value) for key, value in norms.items()}
            check_finite(values, epoch)
            if not steps:
                values |= method.check_first(values, epoch)
            steps.append(values | sampled)
            trained.update(videos.tolist())
    everything = [values for steps in measured.values() for values in steps]
    record = summary(everything) | {"videos_trained": len(trained)}
    if len(measured) > 1:
        record[EXPERTS] = {name: summary(steps) for name, steps in measured.items()}
    return states, record


def summary(updates: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return what several updates measured: of each KEY the mean, and KEY_min and KEY_max.

    The ratio's bounds are those of all updates; its error, which only an expert's first update of
    an epoch measures, is the largest.
    """
    record = {"updates": len(updates)}
    for key in dict.fromkeys(key for values in updates for key in values):
        found = [values[key] for values in updates if key in values]
        if key in BOUNDS:
            record[key] = BOUNDS[key](found)
        else:
            mean = sum(found) / len(found)
            record |= {key: mean, f"{key}_min": min(found), f"{key}_max": max(found)}
    return record


class NotFinite(UserError):
    """An update with a NaN or an infinity."""


def check_finite(values: dict[str, float], epoch: int) -> None:
    """Raise `NotFinite` that names the values which are not finite."""
    bad = ", ".join(f"{k}={v}" for k, v in values.items() if not math.isfinite(v))
    if bad:
        raise NotFinite(f"epoch {epoch}: the update is not finite ({bad})")

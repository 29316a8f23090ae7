"""The optimiser steps of an epoch."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from grpo.credit import Credit
from grpo.learning.data_loss import AnchoredBatch, Rollout
from grpo.learning.method import Method
from grpo.learning.method import kl_weight as constant_kl_weight
from grpo.learning.optimiser import learning_rate
from grpo.records.run_log import EXPERTS
from grpo.sampling import RolloutBatch, Session, States
from wan_jax.errors import UserError

# The values of several updates that an epoch logs as one bound. Others are logged as mean, minimum and
# maximum.
BOUNDS = {"ratio_min": min, "ratio_max": max, "ratio_max_error": max, "learning_rate": max}


def update_epoch(
    session: Session,
    states: States,
    epoch: int,
    rollout: RolloutBatch | None,
    credit: Credit | None,
    kl_weight: float | None = None,
) -> tuple[States, dict]:
    """Return the states after the optimiser steps of an epoch, and the record of the steps. rollout,
    credit: None where the epoch trains on data alone (data.only). kl_weight: of the KL, where the
    guard sets it (train.on_alarm=kl).

    The record has the `summary` of all steps, the number of videos that they trained on
    (`videos_trained`), and the summary of each expert under `EXPERTS` where two are trained. The
    given states are donated. Raises `NotFinite` where an update is not finite, and `UserError` where
    rollout and update disagree.
    """
    spec, method, states = session.spec, session.spec.method, dict(states)
    data = session.data
    measured: dict[str, list[dict[str, float]]] = {}  # of each optimiser step, by expert
    trained: set[int] = set()  # numbers of videos
    # The rollout ends with the last expert on the device, so that one is updated first. The update
    # ends with the first one, with which the next rollout begins.
    for i, segment in reversed(list(enumerate(spec.segments))):
        expert, name = segment.expert, spec.preset.experts[segment.expert]
        if name not in states:
            continue
        steps = measured.setdefault(name, [])
        made, sampled = int(states[name].updates), {}
        if rollout is None or credit is None:
            assert data is not None, "data.only"
            batches = data.batches(spec, i, made)
        else:
            sampled = method.log_sampled(rollout, name, spec.windows.videos(i))
            batches = method.batches(spec, epoch, i, rollout, credit, made)
        for videos, batch, share_kept in batches:
            if data is not None and rollout is not None:
                used = None
                if spec.recipe.data.noise == "rollout":
                    used = Rollout(epoch, rollout.key, videos)
                batch = AnchoredBatch(batch, data.batch(spec, i, made + len(steps), used))
            states[name], metrics, norms = session.functions.updates[expert](
                states[name], session.frozen(expert), batch, share_kept, kl_weight
            )
            values = metrics.averages() | {key: float(value) for key, value in norms.items()}
            check_finite(values, epoch)
            values |= {} if kl_weight is None else {"kl_weight": kl_weight}
            weight = constant_kl_weight(type(method), spec.recipe)
            values |= kl_share(values, method, weight)
            values |= data_share(values, method, weight, spec.recipe.data.weight)
            values["learning_rate"] = learning_rate(spec.settings.optimiser, made + len(steps))
            if not steps:
                values |= method.check_first(values, epoch)
            steps.append(values | sampled)
            trained.update(videos.tolist())
    all_steps = [values for steps in measured.values() for values in steps]
    record: dict[str, Any] = summary(all_steps) | {"videos_trained": len(trained)}
    if len(measured) > 1:
        record[EXPERTS] = {name: summary(steps) for name, steps in measured.items()}
    return states, record


def kl_share(values: Mapping[str, float], method: Method, weight: float) -> dict[str, float]:
    """Return {"kl_share": |w KL| / (|policy term| + |w KL|)} of an update's loss; {} where the KL is
    no term of it.

    values: of the update, with its own weight w as `kl_weight` where that adapts. weight: w where it
    does not. A clipped policy term is about 0 in the first update after sampling, where its
    advantages are centred and all ratios are 1; the share is then about 1.
    """
    weight = values.get("kl_weight", weight)
    if not weight or method.sampling_kl is not None or not {"kl", "policy_loss"} <= values.keys():
        return {}
    term = weight * values["kl"]
    policy = values["policy_loss"] - (term if method.loss_has_kl else 0.0)
    total = abs(policy) + abs(term)
    return {"kl_share": abs(term) / total if total else 0.0}


def data_share(
    values: Mapping[str, float], method: Method, kl_weight: float, weight: float
) -> dict[str, float]:
    """Return {"data_share": |w D| / (|policy term| + |KL term| + |w D|)} of an update's loss, with
    the error D on data; {} where data are no term of it.

    values: of the update. kl_weight: of the KL where that does not adapt. weight: w.
    """
    if not {"data_error", "policy_loss"} <= values.keys():
        return {}
    kl = values.get("kl_weight", kl_weight) * values.get("kl", 0.0)
    kl = 0.0 if method.sampling_kl is not None else kl
    policy = values["policy_loss"] - (kl if method.loss_has_kl else 0.0)
    term = abs(weight * values["data_error"])
    total = abs(policy) + abs(kl) + term
    return {"data_share": term / total if total else 0.0}


def summary(updates: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the number of updates, and for each KEY of their values the mean, KEY_min and KEY_max;
    for the keys of BOUNDS the bound.

    `ratio_max_error` is measured only in the first update of an expert in an epoch.
    """
    record: dict[str, float] = {"updates": len(updates)}
    for key in dict.fromkeys(key for values in updates for key in values):
        measured = [values[key] for values in updates if key in values]
        if key in BOUNDS:
            record[key] = BOUNDS[key](measured)
        else:
            mean = sum(measured) / len(measured)
            record |= {key: mean, f"{key}_min": min(measured), f"{key}_max": max(measured)}
    return record


class NotFinite(UserError):
    """An update has a NaN or an infinity."""


def check_finite(values: dict[str, float], epoch: int) -> None:
    """Raise `NotFinite` with the values that are not finite."""
    bad = ", ".join(f"{k}={v}" for k, v in values.items() if not math.isfinite(v))
    if bad:
        raise NotFinite(f"epoch {epoch}: the update is not finite ({bad})")

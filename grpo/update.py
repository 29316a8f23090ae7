"""The optimiser steps of an epoch."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from grpo.credit import Credit
from grpo.learning.data_loss import AnchoredBatch, Rollout
from grpo.learning.method import Method
from grpo.learning.method import kl_weight as constant_kl_weight
from grpo.learning.optimiser import learning_rate
from grpo.learning.policy import Flat
from grpo.records.run_log import EXPERTS
from grpo.run import RunSpec
from grpo.sampling import RolloutBatch, Session, States
from wan_jax.errors import UserError

LEAST_GRADIENT = 10  # times train.adam_eps, below which the gradient is small
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
    measured: dict[str, list[dict[str, Any]]] = {}  # of each optimiser step, by expert
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
            values["grad_rms"] = gradient_rms(values["grad_norm"], states[name].trainable, spec)
            if not steps:
                values |= method.check_first(values, epoch)
            steps.append(values | sampled)
            trained.update(videos.tolist())
    all_steps = [values for steps in measured.values() for values in steps]
    record: dict[str, Any] = summary(all_steps) | {"videos_trained": len(trained)}
    if len(measured) > 1:
        record[EXPERTS] = {name: summary(steps) for name, steps in measured.items()}
    return states, record


def gradient_rms(norm: float, trainable: Flat, spec: RunSpec) -> float:
    """Return the root mean square of the gradient that AdamW gets, after clipping. norm: before it.
    trainable: arrays of the gradient's shapes.
    """
    size = sum(array.size for array in trainable.values())
    return min(norm, spec.recipe.train.max_grad_norm) / math.sqrt(size)


def new_warnings(spec: RunSpec, record: Mapping[str, Any], known: set[str]) -> list[str]:
    """Return the warnings about the record of an epoch's updates, each kind once. known: the kinds that
    the run has printed, to which those found are added.
    """
    found = {"method": spec.method.warning(dict(record)), "gradient": small_gradient(spec, record)}
    new = {kind: text for kind, text in found.items() if text is not None and kind not in known}
    known.update(new)
    return [*new.values()]


def small_gradient(spec: RunSpec, record: Mapping[str, Any]) -> str | None:
    """Return a warning where train.adam_eps is not small compared with the gradient, or None."""
    rms, eps = record.get("grad_rms", 0.0), spec.recipe.train.adam_eps
    if not 0 < rms < LEAST_GRADIENT * eps:
        return None
    fitting = 10.0 ** math.floor(math.log10(rms / LEAST_GRADIENT**2))
    return (
        f"warning: the gradient's root mean square is {rms:.1e}, under {LEAST_GRADIENT} times "
        f"train.adam_eps={eps:g}, which AdamW adds to it in its divisor: steps are smaller than "
        f"train.learning_rate asks for. Set --config.train.adam_eps={fitting:g} in a new run_dir"
    )


def velocity_excess(spec: RunSpec, record: Mapping[str, Any]) -> str | None:
    """Return what exceeds train.max_velocity_distance in an epoch's record, or None."""
    bound = spec.recipe.train.max_velocity_distance
    for key in spec.method.distances:
        value = record.get(f"{key}_max", 0.0)
        if value > bound:
            return f"{key} reached {value:.3g}, more than train.max_velocity_distance={bound:g}"
    return None


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


def summary(updates: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the number of updates, and for each KEY of their values the mean, KEY_min and KEY_max;
    for the keys of BOUNDS the bound; for values by name their means by name.

    `ratio_max_error` is measured only in the first update of an expert in an epoch.
    """
    record: dict[str, Any] = {"updates": len(updates)}
    for key in dict.fromkeys(key for values in updates for key in values):
        measured = [values[key] for values in updates if key in values]
        if isinstance(measured[0], Mapping):
            record[key] = means_by_key(measured)
        elif key in BOUNDS:
            record[key] = BOUNDS[key](measured)
        else:
            mean = sum(measured) / len(measured)
            record |= {key: mean, f"{key}_min": min(measured), f"{key}_max": max(measured)}
    return record


def means_by_key(values: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of each key over those that have it."""
    found = {key: [v[key] for v in values if key in v] for v in values for key in v}
    return {key: sum(each) / len(each) for key, each in found.items()}


class NotFinite(UserError):
    """An update has a NaN or an infinity."""


def check_finite(values: Mapping[str, Any], epoch: int) -> None:
    """Raise `NotFinite` with the values that are not finite. Those by name are not looked at: their
    mean is another value.
    """
    numbers = {key: value for key, value in values.items() if not isinstance(value, Mapping)}
    bad = ", ".join(f"{k}={v}" for k, v in numbers.items() if not math.isfinite(v))
    if bad:
        raise NotFinite(f"epoch {epoch}: the update is not finite ({bad})")

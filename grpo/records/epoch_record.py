"""What is recorded of an epoch, and its line on the terminal."""

import numpy as np

from grpo.credit import Credit
from grpo.records.clock import timestamp
from grpo.records.progress import Progress
from grpo.run import RunSpec
from grpo.sampling import RolloutBatch
from grpo.scoring import reward_combination
from grpo.scoring.scores import GatheredScores, format_failures
from grpo.settings import video_sizes
from grpo.settings.budget import Spent
from wan_jax.distributed import memory

COLUMNS = 100  # of the terminal


def make(
    spec: RunSpec,
    epoch: int,
    rollout: RolloutBatch,
    scores: GatheredScores,
    credit: Credit,
    losses: dict,
    spent: Spent,
    seconds: dict[str, float],
) -> dict:
    """Return an epoch's record for metrics.jsonl. losses: what the updates measured."""
    groups = credit.groups
    working = seconds["sample"] + seconds["decode"] + seconds["update"]
    size = video_sizes.at(epoch, spec.recipe.sample)
    sampled = {
        "epoch": epoch,
        "time": timestamp(),
        "frames": rollout.frames,
        "height": size.height,
        "width": size.width,
        "shift": size.shift,
        "evaluations": rollout.evaluations,
        "evaluations_saved": rollout.evaluations_saved,
    }
    scored = {
        "spent_evaluations": spent.evaluations,
        "spent_seconds": spent.seconds,
        "reward_mean": groups.mean_reward,
        "reward_std": groups.std_reward,
        "group_std": groups.mean_group_std,
        "group_spread": rollout.group_spread,
        "zero_std_fraction": groups.zero_std_fraction,
        "rewards": reward_combination.means({scores.main: scores.values} | scores.parts),
        "failed_scores": int((~credit.valid).sum()),
        **scores.counts(),
        "videos": spec.settings.videos,
        "seconds": seconds,
        "idle_share": max(0.0, 1 - working / seconds["total"]),
        "peak_memory": memory.peaks().known(),
    }
    if spec.recipe.train.min_group_std:
        scored["weak_groups"] = len(np.unique(rollout.prompt_of[credit.weak]))
    return sampled | losses | scored


def make_of_data(epoch: int, losses: dict, spent: Spent, seconds: dict[str, float]) -> dict:
    """Return the record of an epoch that trained on data alone. The arguments are those of `make`."""
    return {
        "epoch": epoch,
        "time": timestamp(),
        "evaluations": 0,
        **losses,
        "spent_evaluations": spent.evaluations,
        "spent_seconds": spent.seconds,
        "videos": 0,
        "seconds": seconds,
        "idle_share": max(0.0, 1 - seconds["update"] / seconds["total"]),
        "peak_memory": memory.peaks().known(),
    }


def line(record: dict, epochs: int, progress: Progress) -> str:
    """Return an epoch's record in a line of at most `COLUMNS` characters; scores that failed are
    named in a second one.
    """
    begin = f"epoch {record['epoch']}/{epochs}: "
    if "reward_mean" in record:
        parts = [
            f"{begin}reward {record['reward_mean']:.3f}",
            f"spread {record['group_std']:.3f}",
        ]
    else:
        parts = [f"{begin}error on data {record['flow_error']:.4f}"]
        parts += [f"{key} {record[key]:.2f}" for key in ("preferred", "agreed") if key in record]
    gradient = record.get("grad_norm")
    if gradient is not None:
        parts.append(f"grad {gradient:.1e}")
    elif record.get("weak_groups"):
        parts.append(f"nothing to learn, {record['weak_groups']} groups below min_group_std")
    else:
        parts.append("nothing to learn from")
    if "data_share" in record:
        parts.append(f"data {record['data_share']:.1%} of the loss")
    if "ratio_max_error" in record:
        parts.append(f"ratio {record['ratio_max_error']:.0e}")
    seconds = {k: v for k, v in record["seconds"].items() if v >= 0.05 and k != "total"}
    stages = [f"{k} {seconds[k]:.1f}" for k in sorted(seconds, key=lambda k: -seconds[k])]

    def text() -> str:
        longest = f" ({' '.join(stages)})" if stages else ""
        eta = f", ETA {progress.eta}" if progress.eta else ""
        return f"{', '.join(parts)} | {record['seconds']['total']:.1f} s{longest}{eta}"

    while len(text()) > COLUMNS:  # leave out the shortest stages, then the last measures
        (stages or parts).pop()
    failures = format_failures(record.get("failed_scores", 0), record)
    return f"{text()}\n  {failures}" if failures else text()

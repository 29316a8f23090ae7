"""What is recorded of an epoch, and its line on the terminal."""

from grpo.credit import Credit
from grpo.run import RunSpec
from grpo.sampling import RolloutBatch
from grpo.scoring import reward_combination
from grpo.scoring.scores import GatheredScores, format_failures
from grpo.settings.budget import Spent
from wan_jax.distributed import memory


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
    sampled = {
        "epoch": epoch,
        "frames": rollout.frames,
        "evaluations": rollout.evaluations,
        "evaluations_saved": rollout.evaluations_saved,
    }
    scored = {
        "spent_evaluations": spent.evaluations,
        "spent_seconds": spent.seconds,
        "reward_mean": groups.mean_reward,
        "reward_std": groups.std_reward,
        "group_std": groups.mean_group_std,
        "zero_std_fraction": groups.zero_std_fraction,
        "rewards": reward_combination.means({scores.main: scores.values} | scores.parts),
        "failed_scores": int((~credit.valid).sum()),
        **scores.counts(),
        "videos": spec.settings.videos,
        "seconds": seconds,
        "idle_share": max(0.0, 1 - working / seconds["total"]),
        "peak_memory": memory.peaks().known(),
    }
    return sampled | losses | scored


def line(record: dict, epochs: int) -> str:
    """Return an epoch's record in one line."""
    parts = [
        f"epoch {record['epoch']}/{epochs}: reward {record['reward_mean']:.3f}",
        f"spread in groups {record['group_std']:.3f}",
    ]
    if "ratio_max_error" in record:
        parts.append(f"ratio error {record['ratio_max_error']:.1e}")
    gradient = record.get("grad_norm")
    parts.append("nothing to learn from" if gradient is None else f"grad {gradient:.2e}")
    if failures := format_failures(record["failed_scores"], record):
        parts.append(failures)
    stages = " ".join(f"{k} {v:.1f}" for k, v in record["seconds"].items() if v >= 0.05)
    return f"{', '.join(parts)} | {stages} s"

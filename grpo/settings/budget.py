"""What a run may spend, and what it has spent: runs that spend the same can be compared
(`grpo.compare`).

Evaluations are the model's while sampling: one for every video and denoising step, whatever the
guidance (with a prefix that a group shares, one for the group). The update's passes are not among
them, held-out evaluations neither. Seconds are those of the epochs, by a monotonic clock: sampling,
decoding, waiting for scores, update; without start, compilation, held-out evaluations and
checkpoints.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Spent:
    """By a run from its first epoch on; it is stored in every checkpoint."""

    evaluations: int = 0
    seconds: float = 0.0

    def __add__(self, other: "Spent") -> "Spent":
        return Spent(self.evaluations + other.evaluations, self.seconds + other.seconds)


@dataclasses.dataclass(frozen=True)
class Budget:
    """None: no limit. Raises ValueError on limits that allow nothing."""

    evaluations: int | None = None
    seconds: float | None = None

    def __post_init__(self):
        for name, limit in dataclasses.asdict(self).items():
            if limit is not None and not limit > 0:
                raise ValueError(
                    f"budget.{name}={limit} must be above 0; leave it out for no limit"
                )

    def reached(self, spent: Spent) -> bool:
        return any(
            limit is not None and getattr(spent, name) >= limit
            for name, limit in dataclasses.asdict(self).items()
        )

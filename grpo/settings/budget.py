"""The budget of a run, and the part of it that is spent. Runs with equal budgets can be compared
(`grpo.compare`).

Evaluations are forward passes of the model while sampling: one for every video and denoising step, with
or without guidance. Where a group shares its first steps, each of them counts once for the group. The
update and held-out evaluations do not count. Seconds are those of the epochs by a monotonic clock:
sampling, decoding, waiting for scores, update. Start, compilation, held-out evaluations and
checkpoints do not count.
"""

import dataclasses

from grpo.settings.setting import POSITIVE, Section, setting
from wan_jax.errors import UserError

UNITS = ("evaluations", "seconds", "epochs")
ENDLESS = 1_000_000  # epochs of a run that its budget ends


@dataclasses.dataclass(frozen=True)
class Spent:
    """The evaluations and seconds that a run has spent since its first epoch. Every checkpoint stores
    them.
    """

    evaluations: int = 0
    seconds: float = 0.0

    def __add__(self, other: "Spent") -> "Spent":
        return Spent(self.evaluations + other.evaluations, self.seconds + other.seconds)


@dataclasses.dataclass(frozen=True)
class Budget(Section):
    """Limits that end the run after the epoch that reaches one of them."""

    evaluations: int | None = setting(
        None,
        "Number of evaluations of the model while sampling, one a video and step. None: no limit.",
        bounds=POSITIVE,
    )
    seconds: float | None = setting(
        None,
        "Seconds of all epochs, without start, compilation, evaluations and checkpoints. None: no "
        "limit.",
        bounds=POSITIVE,
    )

    def reached(self, spent: Spent) -> bool:
        """Return whether `spent` has reached one of the limits."""
        return any(
            limit is not None and getattr(spent, name) >= limit
            for name, limit in dataclasses.asdict(self).items()
        )


def parse_budget(text: str) -> tuple[str, float]:
    """Parse --budget: 'evaluations:20000' -> ('evaluations', 20000). Raises `UserError`."""
    unit, _, number = text.partition(":")
    try:
        amount = float(number) if unit == "seconds" else int(number)
    except ValueError:
        amount = 0
    if unit not in UNITS or not 0 < amount < float("inf"):
        raise UserError(f"--budget={text}: give {', '.join(f'{u}:N' for u in UNITS)}, N above 0")
    return unit, amount


def budget_settings(unit: str, amount: float) -> tuple[str, ...]:
    """Return the settings of a run that ends with its budget."""
    if unit == "epochs":
        return (f"epochs={amount}",)
    return (f"epochs={ENDLESS}", f"budget.{unit}={amount}")

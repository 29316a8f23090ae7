"""Ranges for the numbers that a user gives, in recipes and flags."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`.

    Attributes:
        low: smallest number.
        high: largest number.
        above: whether `low` itself is excluded.
        below: whether `high` itself is excluded; None: only if it is infinite, so that numbers must
            be finite by default.
        note: what a message about a wrong number adds.
    """

    low: float
    high: float = math.inf
    above: bool = False
    below: bool | None = None
    note: str = ""

    def __contains__(self, value: float) -> bool:
        """Return whether the number is in the range; NaN is in none."""
        below = math.isinf(self.high) if self.below is None else self.below
        return (self.low < value if self.above else self.low <= value) and (
            value < self.high if below else value <= self.high
        )

    def requirement(self, value: float) -> str:
        """Return what `value`, which is not in the range, must be."""
        text = f"must be {'above' if self.above else 'at least'} {self.low}"
        if not math.isinf(self.high):
            text += f" and {'below' if self.below else 'at most'} {self.high}"
        elif not math.isfinite(value):
            text += " and finite" if self.below is None else ""
        return text + (f"; {self.note}" if self.note else "")


# Amounts of work: a number above them is a slip, and would fill the memory or start work for weeks.
STEPS = Range(1, 1000, note="Wan is trained with 1000 timesteps")
SAMPLES = Range(1, 10_000, note="for more, run again with another seed")
CANDIDATES = Range(1, 1000)  # of which the best is taken
PROCESSES = Range(1, 1024)
# JAX makes random keys from 32 bits: a larger seed would give the same numbers as a smaller one.
SEED = Range(0, 2**32 - 1, note="-1 does not stand for a random seed, choose a number")

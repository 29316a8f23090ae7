"""Ranges that the numbers a user gives must lie in, for settings of a recipe and for flags."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`.

    Attributes:
        above: whether `low` itself is left out. below: whether `high` itself is left out. True for
        the default `high`, so that numbers must be finite. note: what a message about a wrong
        number adds.
    """

    low: float
    high: float = math.inf
    above: bool = False
    below: bool | None = None
    note: str = ""

    def __contains__(self, value: float) -> bool:
        """NaN is in no range."""
        below = math.isinf(self.high) if self.below is None else self.below
        return (self.low < value if self.above else self.low <= value) and (
            value < self.high if below else value <= self.high
        )

    def requirement(self, value: float) -> str:
        """Say what `value`, which is not in the range, must be."""
        text = f"must be {'above' if self.above else 'at least'} {self.low}"
        if not math.isinf(self.high):
            text += f" and {'below' if self.below else 'at most'} {self.high}"
        elif not math.isfinite(value):
            text += " and finite" if self.below is None else ""
        return text + (f"; {self.note}" if self.note else "")


# JAX makes its random keys from 32 bits: a larger seed would draw the same as a smaller one.
SEED = Range(0, 2**32 - 1, note="-1 does not stand for a random seed, choose a number")

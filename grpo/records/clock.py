"""The time of day, and the seconds of an epoch's stages."""

import datetime
import time

import jax

STAGES = ("sample", "decode", "score_wait", "update")


def timestamp() -> str:
    """Return the time now in UTC, as in 2026-03-31T18:05:59+00:00."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def duration(seconds: float) -> str:
    """Format a duration: '12 s', '3 min', '5 h 04 min', '2 d 3 h'."""
    minutes = round(seconds / 60)
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if minutes < 120:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


class Stopwatch:
    """Called after a stage: adds the seconds since the last call, once the given arrays are
    computed. The clock is monotonic: setting the machine's clock changes no duration and ends no
    budget.
    """

    def __init__(self):
        self.first = self.last = time.monotonic()
        self.seconds: dict[str, float] = dict.fromkeys(STAGES, 0.0)

    def __call__(self, stage: str, wait_for=None) -> None:
        jax.block_until_ready(wait_for)
        before, self.last = self.last, time.monotonic()
        self.seconds[stage] += self.last - before

    @property
    def total(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self.first

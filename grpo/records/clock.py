"""The seconds of an epoch's stages."""

import time

import jax

STAGES = ("sample", "decode", "score_wait", "update")


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

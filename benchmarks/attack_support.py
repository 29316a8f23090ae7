"""What the attacks on reward servers and on their clients share: a tally per group of attacks, and a
server process.
"""

import collections
import contextlib
import dataclasses
import os
import subprocess
import sys
import tempfile
import urllib.parse
from collections.abc import Iterator

from benchmarks.attack_inputs import TOKEN

MEASURE = ("--reward=rewards.quality:QualityReward", '--options={"name": "exposure"}')
REQUEST_SECONDS = 20.0  # for one answer, on a busy machine

Address = tuple[str, int]


@dataclasses.dataclass
class Tally:
    """Counts of one group of attacks."""

    name: str
    tried: int = 0
    wrong: list[str] = dataclasses.field(default_factory=list)  # "attack: wrong outcome"
    outcomes: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    def add(self, attack: str, outcome: object, right: bool) -> None:
        """Count an attack and its outcome."""
        self.tried += 1
        self.outcomes[str(outcome)] += 1
        if not right:
            self.wrong.append(f"{attack}: {outcome}")

    def __str__(self) -> str:
        """Return the tally as a row of a Markdown table."""
        outcomes = ", ".join(
            f"{count} x {outcome}" for outcome, count in self.outcomes.most_common(8)
        )
        return f"| {self.name} | {self.tried} | {self.tried - len(self.wrong)} | {outcomes} |"


@contextlib.contextmanager
def serving(
    *options: str, files: int | None = None, port: int = 0
) -> Iterator[tuple[Address, subprocess.Popen, list[str]]]:
    """Run `python -m rewards.server` as a process; gives (address, process, lines of its log, which
    are complete at the end).

    files: limit of open files of the process.
    """
    limit = ["sh", "-c", f'ulimit -n {files}; exec "$@"', "sh"] if files else []
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [
                *limit,
                sys.executable,
                "-m",
                "rewards.server",
                f"--port={port}",
                "--workers=1",
                *MEASURE,
                *options,
            ],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=os.environ | {"REWARD_TOKEN": TOKEN},
        )
        assert process.stdout is not None  # it is a pipe
        lines: list[str] = []
        try:
            url = urllib.parse.urlsplit(process.stdout.readline().split()[3])
            yield (url.hostname, url.port), process, lines
        finally:
            process.terminate()
            process.wait()
            process.stdout.close()
            log.seek(0)
            lines += log.read().splitlines()

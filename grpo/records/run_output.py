"""Copies what a run prints into the file `OUTPUT` of its folder, each line with the time."""

import contextlib
import logging
import pathlib
import sys
import traceback
from collections.abc import Iterator
from typing import Any, TextIO

from grpo.records.clock import timestamp
from grpo.records.run_files import warn
from wan_jax.command_line import cli

OUTPUT = "run.log"


class RunOutput:
    """The file of a run's lines. They are held back until `begins` exists, so that a run that is
    refused makes no file. A fault of the disk costs lines and a warning, not the run.
    """

    def __init__(self, begins: pathlib.Path):
        self.begins = begins
        self.waiting: list[str] = []
        self.failed = False

    def add(self, line: str) -> None:
        """Add a line, without its end."""
        self.waiting.append(f"{timestamp()} {line}\n")
        if self.failed or not self.begins.exists():
            return
        try:
            with open(
                self.begins.with_name(OUTPUT), "a", encoding="utf-8", errors="replace"
            ) as file:
                file.write("".join(self.waiting))
            self.waiting.clear()
        except OSError as error:
            self.failed = True  # before the warning, which comes here too
            warn(f"{self.begins.with_name(OUTPUT)} is not continued: {error.strerror}")


class Tee:
    """A text stream that also adds its whole lines to a `RunOutput`. Where a line
    is overwritten, as by progress bars, its last text counts.
    """

    def __init__(self, stream: TextIO, output: RunOutput):
        self.stream, self.output, self.begun = stream, output, ""

    def write(self, text: str) -> int:
        count = self.stream.write(text)
        *lines, self.begun = (self.begun + text).split("\n")
        self.begun = self.begun.rpartition("\r")[2]
        for line in lines:
            if line := line.rpartition("\r")[2].rstrip():
                self.output.add(line)
        return count

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class LogLines(logging.Handler):
    """Adds what libraries log, whose handlers have kept the stream from before."""

    def __init__(self, output: RunOutput):
        super().__init__(logging.WARNING)
        self.output = output

    def emit(self, record: logging.LogRecord) -> None:
        self.output.add(f"{record.levelname.lower()}: {record.getMessage()}")


@contextlib.contextmanager
def recorded(begins: pathlib.Path) -> Iterator[RunOutput]:
    """Copy what is printed and logged, and the error that ends the run, into the file `OUTPUT`
    beside the file `begins`, once that exists.
    """
    output = RunOutput(begins)
    handler = LogLines(output) if logging.root.handlers else logging.NullHandler()
    before = sys.stdout, sys.stderr
    tees: Any = [Tee(stream, output) for stream in before]
    sys.stdout, sys.stderr = tees
    logging.root.addHandler(handler)
    try:
        yield output
    # Broad, because every end of a run belongs into its log; it is raised again.
    except BaseException as error:
        known = cli.explain(error)
        text = known[0] if known else "".join(traceback.format_exception(error))
        for line in text.strip().splitlines():
            output.add(line)
        raise
    finally:
        logging.root.removeHandler(handler)
        sys.stdout, sys.stderr = before

"""Reads what a trainer's native libraries print, and passes it on to standard error, all but one
thing.

When the coordinator of a run on several hosts is gone, JAX's own client aborts the process from
C++, with a dump of its stack and nothing that Python could catch. This program stands between:
started by `divert` with the reading end of a pipe, it says in one line what happened instead. It
imports nothing but the standard library, and ends with the pipe.

A line that begins with MESSAGE sets what will be said.
"""

import os
import pathlib
import re
import signal
import subprocess
import sys

MESSAGE = b"\x1f"
LOST = re.compile(
    rb"Terminating process because the JAX distributed service|Polled an error from coordination service"
    rb"|Use error polling to propagate the following error"
)
STATUS = re.compile(rb"absl::Status: ([^\n]*)")
# gloo prints its greeting in pieces, so that those of several threads mix; when a run ends, JAX
# 0.11 says in five lines that nobody watches its processes any more
NOISE = re.compile(
    rb"^(\[Gloo\] Rank|Expected number of connected|connected to|peer ranks|is|[.:\d\s])*$"
    rb"|W\d{4} [\d:.]+ +\d+ (coordination_service|pjrt_client\.cc:\d+\] WatchTasksAsync failed)"
    rb"|Additional GRPC error information .*/WatchTasks:|:[A-Z]+:|=== Source Location Trace"
    rb"|external/xla"
)


def divert() -> None:
    """Puts this program behind file descriptors 1 and 2; Python's own `sys.stdout` and `sys.stderr`
    go on writing where they did.
    """
    out, real = os.dup(1), os.dup(2)
    reading, writing = os.pipe()
    subprocess.Popen(
        [sys.executable, "-I", str(pathlib.Path(__file__).resolve())],
        stdin=reading,
        stdout=real,
        stderr=real,
        start_new_session=True,
    )  # Ctrl-C is the trainer's
    os.close(reading)
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        stream.flush()
        os.dup2(writing, number)
    os.close(writing)
    sys.stdout = os.fdopen(
        out,
        "w",
        buffering=1 if os.isatty(out) else -1,
        encoding=sys.stdout.encoding,
        errors=sys.stdout.errors,
    )
    sys.stderr = os.fdopen(
        real, "w", buffering=1, encoding=sys.stderr.encoding, errors="backslashreplace"
    )


def set_message(text: str) -> None:
    """What to say when JAX aborts this process from now on."""
    os.write(2, MESSAGE + text.encode() + b"\n")


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    message, lost, status = b"error: the run's processes lost each other", False, b""
    for line in sys.stdin.buffer:
        if line.startswith(MESSAGE):
            message = line.removeprefix(MESSAGE).rstrip(b"\n")
        elif lost or LOST.search(line):  # the process aborts: the rest is its stack
            lost, status = True, status or (found[1] if (found := STATUS.search(line)) else b"")
        elif not NOISE.search(line):
            os.write(2, line)
    if lost:
        os.write(2, message + (b" (" + status.split(b". ")[0] + b")" if status else b"") + b"\n")


if __name__ == "__main__":
    main()

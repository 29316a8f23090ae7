"""Filters what native libraries print while several hosts train, and passes the rest on to standard
error.

When the coordinator is gone, JAX's client aborts the process from C++, with a stack trace and
nothing that Python could catch. This program reads the output instead: `divert` starts it with the
reading end of a pipe, and it prints one line that explains what happened. It imports only the
standard library, and ends when the pipe is closed.

A line that begins with MESSAGE sets the text to print in that case.
"""

import os
import pathlib
import re
import signal
import subprocess
import sys

MESSAGE = b"\x1f"
LOST = re.compile(
    rb"Terminating process because the JAX distributed service"
    rb"|Polled an error from coordination service"
    rb"|Use error polling to propagate the following error"
)
STATUS = re.compile(rb"absl::Status: ([^\n]*)")
# gloo prints its greeting in pieces, so that those of several threads mix; at the end of a run, JAX
# 0.11 prints five lines about watches that were cancelled
NOISE = re.compile(
    rb"^(\[Gloo\] Rank|Expected number of connected|connected to|peer ranks|is|[.:\d\s])*$"
    rb"|W\d{4} [\d:.]+ +\d+ (coordination_service|pjrt_client\.cc:\d+\] WatchTasksAsync failed)"
    rb"|Additional GRPC error information .*/WatchTasks:|:[A-Z]+:|=== Source Location Trace"
    rb"|external/xla"
)


def divert() -> None:
    """Start this program on file descriptors 1 and 2. Python's own `sys.stdout` and `sys.stderr`
    still write to the original ones.
    """
    original_out = os.dup(1)
    original_err = os.dup(2)
    reading, writing = os.pipe()
    subprocess.Popen(
        [sys.executable, "-I", str(pathlib.Path(__file__).resolve())],
        stdin=reading,
        stdout=original_err,
        stderr=original_err,
        start_new_session=True,
    )  # its own session: Ctrl-C is for the trainer only
    os.close(reading)
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        stream.flush()
        os.dup2(writing, number)
    os.close(writing)
    sys.stdout = os.fdopen(
        original_out,
        "w",
        buffering=1 if os.isatty(original_out) else -1,
        encoding=sys.stdout.encoding,
        errors=sys.stdout.errors,
    )
    sys.stderr = os.fdopen(
        original_err, "w", buffering=1, encoding=sys.stderr.encoding, errors="backslashreplace"
    )


def set_message(text: str) -> None:
    """Set the line to print if JAX aborts this process from now on."""
    os.write(2, MESSAGE + text.encode() + b"\n")


def main() -> None:
    """Copy standard input to standard error, without noise and without the trace of an abort."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    message = b"error: the run's processes lost each other"
    lost = False
    status = b""
    for line in sys.stdin.buffer:
        if line.startswith(MESSAGE):
            message = line.removeprefix(MESSAGE).rstrip(b"\n")
        elif lost or LOST.search(line):  # the process aborts: the rest is its stack
            lost = True
            if not status and (found := STATUS.search(line)):
                status = found[1]
        elif not NOISE.search(line):
            os.write(2, line)
    if lost:
        os.write(2, message + (b" (" + status.split(b". ")[0] + b")" if status else b"") + b"\n")


if __name__ == "__main__":
    main()

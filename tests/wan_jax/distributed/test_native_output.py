"""The program behind a process's native output: what it passes on, and what it says when JAX
aborts.
"""

import subprocess
import sys

from wan_jax.distributed import native_output

GREETING = (
    "[Gloo] Rank 0 is connected to 1 peer ranks. Expected number of connected peer ranks is : 1"
)
FAREWELL = """\
W1122 03:48:04.063717    4385 pjrt_client.cc:1605] WatchTasksAsync failed for task 0: CANCELLED: CANCELLED
Additional GRPC error information from remote target coordination_service while calling /xla.Service/WatchTasks:
:CANCELLED:CANCELLED [type.googleapis.com/tensorflow.DerivedStatus='']
=== Source Location Trace: ===
external/xla+/xla/tsl/distributed_runtime/rpc/grpc_util.h:89"""
ABORT = """\
F1122 03:48:04.1 1 client.h:80] Terminating process because the JAX distributed service detected fatal errors
absl::Status: UNAVAILABLE: heartbeat timeout. More
    @ 0x7f some stack"""


def said(*lines):
    done = subprocess.run(
        [sys.executable, native_output.__file__],
        input="\n".join(lines) + "\n",
        text=True,
        capture_output=True,
        timeout=30,
    )
    assert done.returncode == 0 and done.stdout == ""
    return done.stderr.splitlines()


def test_noise_is_kept_back_and_the_rest_passed_on():
    assert said(GREETING, "a kernel's warning", FAREWELL, "the last line") == [
        "a kernel's warning",
        "the last line",
    ]


def test_an_abort_is_one_line():
    assert said("before", "\x1ferror: process 1 lost process 0", ABORT) == [
        "before",
        "error: process 1 lost process 0 (UNAVAILABLE: heartbeat timeout)",
    ]
    assert said(ABORT)[0].startswith("error: the run's processes lost each other")

"""Wan text-to-video models in JAX/Flax NNX, and how to sample from them."""

import os
import signal
import sys


def _stop(*_):
    print("\nstopped before anything was begun", file=sys.stderr, flush=True)
    os._exit(130)  # at once: an exception could be raised, and lost, in some library's callback


if sys.argv[:1] == ["-m"]:  # `python -m` one of our programs: Ctrl-C during its imports is one line, no traceback;
    signal.signal(signal.SIGINT, _stop)  # `cli.run` takes over

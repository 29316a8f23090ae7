"""Wan text-to-video models in JAX/Flax NNX, and how to sample from them."""

import os
import signal
import sys

COMMANDS = ("convert", "grpo", "wan_jax")  # packages whose modules are run by `python -m`


def _stop(*_):
    print("\nstopped before anything was begun", file=sys.stderr, flush=True)
    os._exit(130)  # at once: an exception could be raised, and lost, in some library's callback


def _is_command() -> bool:
    """Whether Python is importing this package because it runs one of the project's own commands by
    `python -m`.
    """
    if sys.argv[:1] != ["-m"]:  # what it is until the module is found
        return False
    module = sys.orig_argv[-len(sys.argv)].removeprefix("-m")
    return module.partition(".")[0] in COMMANDS


# Ctrl-C during the imports of a command, before `cli.run` handles it, prints one line, no
# traceback.
if _is_command():
    # Every other program that imports this package keeps its own handling.
    signal.signal(signal.SIGINT, _stop)

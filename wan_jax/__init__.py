"""Wan text-to-video models in JAX/Flax NNX, and how to sample from them.

Packages:

    models        networks, their configurations, attention backends, adapters
    diffusion     schedules, solvers, the SDE step, guidance: pure functions
    inference     prompts, embeddings, sampling, decoding, reward guidance
    distributed   mesh, sharding, several processes, memory
    storage       model folders, checkpoints, pictures and videos
    command_line  what all commands share
    sample        the command `python -m wan_jax.sample`
    api           the same from Python: `wan_jax.load(folder).sample(prompts)`

Letters in the shapes of arrays; arrays are channels-last:

    B    videos of a batch                 S  tokens of a video      D  width of a network
    F    latent frames                     St text rows              N  attention heads
    H W  latent height and width           Sq Sk  queries, keys      L  layers
    C    latent channels                   T  denoising steps        K  videos of a prompt (group)

Pixels are [B, frames, height, width, 3]. Signatures with `jaxtyping` state shapes and dtypes. They
are documentation: tests/wan_jax/test_signatures.py checks them, at run time nothing does.
"""

import os
import signal
import sys
import typing

if typing.TYPE_CHECKING:
    from wan_jax.api import Model, Videos, load

__all__ = ["Model", "Videos", "load"]

COMMANDS = ("convert", "grpo", "wan_jax")  # packages whose modules are run by `python -m`


def __getattr__(name: str) -> typing.Any:
    """Return what `wan_jax.api` has, which imports JAX: commands answer --help without it."""
    if name in __all__:
        from wan_jax import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _stop(*_):
    """Handle SIGINT before `cli.run` does."""
    print("\nstopped before the work began", file=sys.stderr, flush=True)
    os._exit(130)  # an exception could be raised, and lost, in a callback of a library


def _command() -> str:
    """Return the name of the module if Python imports this package to run one of the project's
    commands by `python -m`, else ''.
    """
    if sys.argv[:1] != ["-m"]:  # its value until Python has found the module
        return ""
    module = sys.orig_argv[-len(sys.argv)].removeprefix("-m")
    return module if module.partition(".")[0] in COMMANDS else ""


# Ctrl-C during the imports of a command prints one line without a traceback, and --help needs no
# imports. Other programs that import this package are not changed.
if _command():
    signal.signal(signal.SIGINT, _stop)
    from wan_jax.command_line import early

    early.answer(_command(), sys.argv[1:])

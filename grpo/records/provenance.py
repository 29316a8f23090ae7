"""Where the results of a run come from: an entry of `provenance.json` for each start of the run."""

import functools
import importlib.metadata
import os
import pathlib
import platform
import subprocess
import sys
from typing import Any

import jax

from grpo.learning.method import kl_weight
from grpo.records.clock import timestamp
from grpo.run import RunSpec
from grpo.settings.schema import values_of
from grpo.settings.unused import unread
from wan_jax.diffusion import sde

PACKAGES = ("jax", "jaxlib", "flax", "orbax-checkpoint", "optax", "numpy", "wan-jax-grpo")


def entry(spec: RunSpec, command: str, epoch: int) -> dict[str, Any]:
    """Return the entry of a start. command: the command line. epoch: after which the run continues;
    0: at its beginning.
    """
    devices = spec.mesh.devices
    return {
        "time": timestamp(),
        "epoch": epoch,
        "command": command,
        "hardware": {
            "devices": f"{devices.size} x {devices.flat[0].device_kind}",
            "processes": jax.process_count(),
            "memory_of_a_device": spec.memory,
            "cpus": os.cpu_count(),
            "system": platform.platform(),
        },
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": commit(),
        "in_force": in_force(spec),
    }


def command_line(module: str) -> str:
    """Return the command line of the command `module`, or the program that calls its functions."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None and spec.name == module:
        return " ".join([f"python -m {module}", *sys.argv[1:]])
    return f"{module}, called by {sys.argv[0] or 'a Python session'}"


def in_force(spec: RunSpec) -> dict[str, Any]:
    """Return {key: value} of the settings that are left to the run, by None, 0 or auto, with what they
    are in it.
    """
    recipe, method, mesh = spec.recipe, spec.settings.method, dict(spec.mesh.shape)
    noise_level, max_step_std = sde.DEFAULTS[recipe.sample.sde]
    judged = spec.evaluated_sizes[0]
    chosen = {
        "model.attention": spec.backend,
        "model.remat": spec.remat,
        "sample.noise_level": noise_level,
        "sample.max_step_std": max_step_std,
        "eval.frames": judged.frames,
        "eval.height": judged.height,
        "eval.width": judged.width,
        "eval.shift": judged.shift,
        "train.kl_weight": kl_weight(type(method), recipe),
        "train.ratio_tolerance": getattr(method, "ratio_bound", None),
        "mesh.fsdp": mesh.get("fsdp"),
        "mesh.context": mesh.get("context"),
    }
    if len(spec.preset.experts) > 1:
        chosen["sample.guidance_2"] = recipe.sample.guidance
        chosen["eval.guidance_2"] = recipe.eval.guidance
    values, ignored = values_of(recipe), unread(recipe)
    return {
        key: value
        for key, value in chosen.items()
        if values[key] in (None, 0, "auto") and key not in ignored and value is not None
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def commit() -> str | None:
    """Return the git commit of the source tree, with "-dirty" where tracked files differ from it; None
    where it is no checkout, or there is no git.
    """
    root = pathlib.Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = [
        "git",
        "-C",
        str(root),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
        "--exclude=*",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None

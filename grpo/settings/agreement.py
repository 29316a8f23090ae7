"""Checks, once the processes of a run on several hosts are connected, that they agree on folders,
settings, prompts and code.
"""

import hashlib
import importlib.metadata
import pathlib

from grpo.data.prompts import PromptSet
from grpo.settings.schema import SETTINGS, values_of
from wan_jax.distributed import multihost
from wan_jax.storage import folder_lock, model_dir

CODE = ("wan_jax", "grpo", "rewards", "convert")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def check(recipe, prompts: dict[str, PromptSet]) -> None:
    """Checks that all processes share their folders and have equal recipes, prompts and code. All
    processes must call this; process 0 must hold the lock of `run_dir`.

    recipe: a `grpo.settings.schema.Recipe`, or a ConfigDict with the same keys. prompts: the prompt
    sets by the keys of their settings. Raises `UserError`, the same on every process.
    """
    run_dir, model = pathlib.Path(recipe.run_dir), pathlib.Path(recipe.model.path)
    multihost.check_same_folder(
        "config.run_dir", recipe.run_dir, lambda: folder_lock.read(run_dir / folder_lock.NAME)
    )
    multihost.check_same_folder(
        "config.model.path",
        recipe.model.path,
        lambda: folder_lock.read(model / model_dir.MANIFEST),
    )
    multihost.check_same_facts(facts(recipe, prompts))


def facts(recipe, prompts: dict[str, PromptSet]) -> dict[str, str]:
    """Returns what must be equal on all processes, by name; of files, digests of their content."""
    found = {
        f"config.{key}": repr(value)
        for key, value in values_of(recipe).items()
        if not SETTINGS[key].per_process
    }
    for key, known in prompts.items():
        digest = _digest(repr((known.prompts, known.targets)).encode())
        found[key] = f"{len(known)} prompts ({digest})"
    root = pathlib.Path(__file__).parents[2]
    files = sorted(path for package in CODE for path in (root / package).rglob("*.py"))
    found["the code of " + ", ".join(CODE)] = _digest(
        b"".join(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() for path in files)
    )
    return found | {f"the version of {name}": importlib.metadata.version(name) for name in PACKAGES}


def _digest(data: bytes) -> str:
    return f"SHA-256 {hashlib.sha256(data).hexdigest()[:16]}"

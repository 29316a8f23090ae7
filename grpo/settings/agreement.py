"""Check that the connected processes of a run on several hosts agree on folders, settings, prompts and
code.
"""

import hashlib
import importlib.metadata
import pathlib

from grpo.data.prompts import PromptSet
from grpo.settings.schema import SETTINGS, values_of
from wan_jax.distributed import multihost
from wan_jax.storage import folder_lock, merged_loras, model_dir

CODE = ("wan_jax", "grpo", "rewards", "convert")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def check(recipe, prompts: dict[str, PromptSet]) -> None:
    """Raises `UserError`, the same on every process, unless all processes share their folders and have
    equal recipes, prompts and code. All processes must call this together, and process 0 must have
    locked `run_dir`.

    recipe: a `grpo.settings.schema.Recipe`, or a ConfigDict with the same keys. prompts: the prompt
    sets by the keys of their settings.
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
    """Return the facts that must be equal on all processes, by name; for files, digests of their
    content. The arguments are those of `check`.
    """
    known = {
        f"config.{key}": repr(value)
        for key, value in values_of(recipe).items()
        if not SETTINGS[key].per_process
    }
    for lora in merged_loras.find(recipe.model.loras, "config.model.loras"):
        known[f"config.model.loras: {lora}"] = f"SHA-256 {lora.digest[:16]}"
    for key, prompt_set in prompts.items():
        digest = _digest(repr((prompt_set.prompts, prompt_set.targets)).encode())
        known[key] = f"{len(prompt_set)} prompts ({digest})"
    root = pathlib.Path(__file__).parents[2]
    files = sorted(path for package in CODE for path in (root / package).rglob("*.py"))
    known["the code of " + ", ".join(CODE)] = _digest(
        b"".join(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() for path in files)
    )
    return known | {f"the version of {name}": importlib.metadata.version(name) for name in PACKAGES}


def _digest(data: bytes) -> str:
    return f"SHA-256 {hashlib.sha256(data).hexdigest()[:16]}"

"""What the processes of a run on several hosts must have in common, checked when they have found
each other.
"""

import hashlib
import importlib.metadata
import pathlib

import ml_collections

from grpo.data.prompts import PromptSet
from grpo.settings import parse
from wan_jax.distributed import multihost
from wan_jax.storage import folder_lock, model_dir

# settings that may differ between hosts: folders and files whose content is compared, how and where
# a process reaches its rewards, and the trackers, which process 0 alone writes to
PER_PROCESS = (
    "run_dir",
    "model.path",
    "prompts.train",
    "prompts.heldout",
    "reward.workers",
    "reward.servers",
    "reward.token_env",
    "reward.timeout",
    "reward.retries",
    "reward.patience",
    "reward.clip_model",
    "reward.pickscore_model",
    "log.",
)
CODE = ("wan_jax", "grpo", "rewards", "convert")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def check(c: ml_collections.ConfigDict, prompts: dict[str, PromptSet]) -> None:
    """Checks that all processes share their folders and have equal recipes, prompts and code; all
    must call this.

    Process 0 must hold the lock of `c.run_dir`. prompts: the prompt sets by the names of their
    settings. Raises `UserError`, the same on every process.
    """
    run_dir, model = pathlib.Path(c.run_dir), pathlib.Path(c.model.path)
    multihost.check_same_folder(
        "config.run_dir", c.run_dir, lambda: folder_lock.read(run_dir / folder_lock.NAME)
    )
    multihost.check_same_folder(
        "config.model.path", c.model.path, lambda: folder_lock.read(model / model_dir.MANIFEST)
    )
    multihost.check_same_facts(facts(c, prompts))


def facts(c: ml_collections.ConfigDict, prompts: dict[str, PromptSet]) -> dict[str, str]:
    """What must be equal, by name; files as digests of their content."""
    values = {
        f"config.{key}": repr(value)
        for key, value in parse.flat(c.to_dict()).items()
        if not any(
            key == name or (name.endswith(".") and key.startswith(name)) for name in PER_PROCESS
        )
    }
    for name, known in prompts.items():
        values[name] = (
            f"{len(known)} prompts ({_digest(repr((known.prompts, known.targets)).encode())})"
        )
    root = pathlib.Path(__file__).parents[2]
    files = sorted(path for package in CODE for path in (root / package).rglob("*.py"))
    values["the code of " + ", ".join(CODE)] = _digest(
        b"".join(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() for path in files)
    )
    return values | {
        f"the version of {name}": importlib.metadata.version(name) for name in PACKAGES
    }


def _digest(data: bytes) -> str:
    return f"SHA-256 {hashlib.sha256(data).hexdigest()[:16]}"

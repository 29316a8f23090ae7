"""Finding and checking the files of learned rewards: a reward with wrong weights must not start."""

import ast
import importlib.util
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from rewards.base import RewardError

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
INSTALL = "pip install -e '.[learned]'"


def check_packages(what: str) -> None:
    """Raise `RewardError` where PyTorch or transformers is missing. what: the reward's name."""
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        raise RewardError(f"{what} needs {' and '.join(missing)}: {INSTALL}")


def find(what: str, path: str) -> pathlib.Path:
    """Return a file or folder of this machine, or the local copy of a Hugging Face repository.

    what: begins the messages, e.g. "VideoAlign: path". path: of the file or folder, or
    OWNER/NAME, which is downloaded unless HF_HUB_OFFLINE is set. Raises `RewardError`.
    """
    local = pathlib.Path(path).expanduser()
    if path and local.exists():
        return local
    if not HUB_ID.fullmatch(path):
        raise RewardError(
            f"{what}={path!r} is neither a file, a folder nor a repository OWNER/NAME: give the "
            "place of the downloaded weights"
        )
    import huggingface_hub

    try:
        return pathlib.Path(huggingface_hub.snapshot_download(path))
    except Exception as error:  # of the network or the hub; the message names the repository
        reason = (" ".join(str(error).split()) or type(error).__name__)[:200]
        raise RewardError(
            f"{what}={path!r} is not on this machine and cannot be downloaded ({reason}): download "
            "it and give the folder"
        ) from error


def read_tensors(file: pathlib.Path) -> dict[str, Any]:
    """Return the tensors of a .safetensors file, or of one that `torch.save` wrote, on the CPU.

    A dict under the key 'model' is taken for the weights. Nothing is unpickled but tensors. Raises
    `RewardError`.
    """
    import safetensors.torch
    import torch

    try:
        if file.suffix == ".safetensors":
            return safetensors.torch.load_file(str(file))
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files fail in many ways
        reason = " ".join(str(error).split())[:200]
        raise RewardError(f"the weights in {file} cannot be read: {reason}") from error
    state = state.get("model", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(torch.is_tensor(v) for v in state.values()):
        raise RewardError(f"{file} holds no weights: a dict of tensors by name was expected")
    return state


def read_folder(what: str, folder: pathlib.Path) -> dict[str, Any]:
    """Return the tensors of all .safetensors files of a folder. Raises `RewardError` without any."""
    state: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")):
        state |= read_tensors(file)
    if not state:
        raise RewardError(f"{what}={str(folder)!r} has no .safetensors files: download the weights")
    return state


def check_keys(
    what: str, expected: Mapping[str, tuple[int, ...]], state: Mapping[str, Any], fix: str
) -> None:
    """Raise `RewardError`, in one line, unless a checkpoint has exactly the weights of a model.

    expected: shapes by name. state: the checkpoint's tensors. fix: what the user should do.
    """
    problems = {
        "are missing": [key for key in expected if key not in state],
        "are unknown": [key for key in state if key not in expected],
        "have another shape": [
            f"{key} {tuple(state[key].shape)} instead of {shape}"
            for key, shape in expected.items()
            if key in state and tuple(state[key].shape) != tuple(shape)
        ],
    }
    found = [
        f"{len(keys)} weights {problem}, such as {keys[0]}"
        for problem, keys in problems.items()
        if keys
    ]
    if found:
        raise RewardError(f"{what}: {'; '.join(found)}: {fix}")


def check_loaded(what: str, info: Mapping[str, Any]) -> None:
    """Raise `RewardError` where `from_pretrained` found no weights for a part of the model, which
    would be random. info: its loading info.
    """
    lacking = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
    if lacking:
        raise RewardError(
            f"{what}: {len(lacking)} weights are missing or have another shape, such as "
            f"{lacking[0]}: give the complete weights of this model"
        )


def check_trained(what: str, head: Mapping[str, Any], fix: str) -> None:
    """Raise `RewardError` for a head that was never trained or is damaged: a matrix of equal
    values, or one that is not finite.

    head: its tensors by name. A head with random weights cannot be told from a trained one here;
    `python -m grpo.check_rewards` builds a reward twice and compares the values.
    """
    for key, tensor in head.items():
        if not bool(tensor.isfinite().all()):
            raise RewardError(f"{what}: the head's {key} is not finite: {fix}")
        if tensor.ndim > 1 and bool((tensor == tensor.flatten()[0]).all()):
            raise RewardError(f"{what}: the head's {key} has no trained weights: {fix}")


def place(device: str, dtype: str) -> tuple[str, Any]:
    """Return the device and the torch dtype: "" chooses the GPU where there is one (CUDA or ROCm),
    and there bfloat16, else float32. Raises `RewardError`.
    """
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or ("float32" if device == "cpu" else "bfloat16")
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise RewardError(f"dtype={dtype!r} is unknown: give bfloat16, float16 or float32")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise RewardError(f"device={device!r} cannot be used ({reason}): give cpu") from error
    return device, kind


# --- Templates of questions -----------------------------------------------------------------------


def read_constants(what: str, path: pathlib.Path, names: Iterable[str]) -> dict[str, str]:
    """Return the texts that are assigned to `names` in a Python file, or in those of a folder.

    The files are parsed, not run. Raises `RewardError` for a name that is not found.
    """
    names = tuple(names)
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
    found: dict[str, str] = {}
    for file in files:
        source = file.read_text(encoding="utf-8", errors="replace")
        if not any(name in source for name in names):
            continue
        try:
            statements = ast.parse(source).body
        except SyntaxError:
            continue
        for statement in statements:
            match statement:
                case ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant(value=str(text))):
                    if name in names and found.setdefault(name, text) != text:
                        raise RewardError(
                            f"{what}={str(path)!r} defines {name} twice: give one of the files"
                        )
    lacking = [name for name in names if name not in found]
    if lacking:
        raise RewardError(
            f"{what}={str(path)!r} does not define {', '.join(lacking)}: give the file of the "
            "published repository, or a text file with the question"
        )
    return found

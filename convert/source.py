"""The source of a conversion, a local folder or a hub id, checked before its weights are read."""

import pathlib
import re

from convert import hub
from convert.folders import JOURNAL
from wan_jax.command_line import cli
from wan_jax.errors import UserError
from wan_jax.models.config import ConfigError, load_scheduler, read_json
from wan_jax.models.tokenizer import Tokenizer, TokenizerError
from wan_jax.storage import model_dir
from wan_jax.storage.paths import check_apart, expand

PIPELINE = "WanPipeline"
COPIED = ("tokenizer", "scheduler")  # folders that are copied without change
DIFFUSERS = "the '-Diffusers' repository of the model, such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
FILES = {
    ".safetensors": "a single-file checkpoint (of ComfyUI or in Wan's original layout)",
    ".pth": "a PyTorch file",
    ".pt": "a PyTorch file",
    ".ckpt": "a PyTorch file",
    ".bin": "a PyTorch file",
    ".gguf": "a quantised GGUF file",
}
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def source_folder(src: str, revision: str | None = None) -> pathlib.Path:
    """Return the local folder or the hub's snapshot. Raises `UserError` if there is neither."""
    path = expand(src)
    if path.is_dir():
        if revision is not None:
            raise UserError(
                f"--revision={revision} is for hub ids, and --src {src} is a local folder; omit it"
            )
        return path
    if path.suffix.lower() in FILES or path.exists():
        kind = FILES.get(path.suffix.lower(), "a file")
        raise UserError(
            f"--src {src} is {kind}{'' if path.exists() else ' by its name, and does not exist'}; "
            f"only a folder in Diffusers layout can be converted: give --src {DIFFUSERS}, or a "
            "folder of it"
        )
    if not HUB_ID.fullmatch(src):
        raise UserError(f"--src {src} is neither a folder nor a hub id of the form owner/name")
    return _download(src, revision)


def _download(src: str, revision: str | None) -> pathlib.Path:
    """Download and return the snapshot of a hub id.

    model_index.json comes first, so that another layout is refused before its weights are
    downloaded. Raises `UserError`.
    """
    from huggingface_hub import constants, hf_hub_download, snapshot_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils import validate_repo_id

    unreachable = ""
    elsewhere = (
        f"or give --src FOLDER, which `hf download {src} --local-dir FOLDER` writes on a machine with a "
        "network (there is no local folder of that name)"
    )
    try:
        validate_repo_id(src)
        unreachable = "" if constants.HF_HUB_OFFLINE else hub.unreachable()
        where: dict = {"revision": revision, "local_files_only": bool(unreachable)}
        index = check_pipeline(
            pathlib.Path(hf_hub_download(src, "model_index.json", **where)).parent
        )
        components = [
            name for name in model_dir.COMPONENTS if name != "transformer_2" or two_experts(index)
        ]
        patterns = [
            "model_index.json",
            *(f"{name}/*" for name in COPIED),
            *(f"{name}/*.{kind}" for name in components for kind in ("json", "safetensors")),
        ]
        return pathlib.Path(snapshot_download(src, allow_patterns=patterns, **where))
    except HFValidationError as error:
        reason = f"it is not a hub id: {str(error).splitlines()[0][:200]}"
    except RepositoryNotFoundError:
        reason = (
            "the hub knows no such model, or it is private; check the spelling, log in with `hf "
            "auth login`, or give --src a folder that holds model_index.json"
        )
    except RevisionNotFoundError:
        reason = (
            f"it has no revision {revision!r}; give --revision a branch, a tag or a commit of it"
        )
    except LocalEntryNotFoundError as error:
        if constants.HF_HUB_OFFLINE:
            reason = (
                "HF_HUB_OFFLINE is set and the model is not in the cache "
                f"{constants.HF_HUB_CACHE}; unset it, " + elsewhere
            )
        else:
            reason = (
                f"this machine cannot reach {constants.ENDPOINT} ({unreachable or str(error)[:120]}), "
                f"and the model is not in the cache {constants.HF_HUB_CACHE}; connect it, {elsewhere}. "
                "HF_HUB_OFFLINE=1 reads the cache without asking the hub"
            )
    except EntryNotFoundError:
        reason = (
            f"it has no model_index.json, so it is not in Diffusers layout; give --src {DIFFUSERS}"
            + ("" if src.endswith("-Diffusers") else f" ({src}-Diffusers, if there is one)")
        )
    except (HfHubHTTPError, OSError) as error:
        if cli.disk_error(error):
            raise
        reason = (
            f"{str(error).splitlines()[0][:200]}; run the same command again to continue the "
            "download, " + elsewhere
        )
    raise UserError(f"{src} cannot be downloaded: {reason}")


def check_pipeline(src: pathlib.Path) -> dict:
    """Return model_index.json of a Wan text-to-video pipeline. Raises `UserError` otherwise."""
    path = src / "model_index.json"
    if not path.is_file():
        raise UserError(
            f"{path} is missing: {src} is not a checkpoint in Diffusers layout (Wan's original "
            f"layout is not supported); give --src {DIFFUSERS}"
        )
    index = read_json(path)
    if index.get("_class_name") != PIPELINE:
        raise UserError(
            f"{path}: the pipeline is {index.get('_class_name')!r}, only {PIPELINE!r} (text to "
            "video) can be converted"
        )
    boundary, second = index.get("boundary_ratio"), index.get("transformer_2")
    if not isinstance(second, list | None) or not isinstance(
        index.get("expand_timesteps", False), bool
    ):
        raise UserError(
            f"{path} is damaged: transformer_2 is {second!r} (a list or null expected) and "
            f"expand_timesteps is {index.get('expand_timesteps')!r} (true or false expected)"
        )
    number = (
        isinstance(boundary, int | float) and not isinstance(boundary, bool) and 0 < boundary < 1
    )
    if two_experts(index) != (boundary is not None) or not (number or boundary is None):
        raise UserError(
            f"{path}: boundary_ratio is {boundary!r} and transformer_2 is {second}: "
            "a model with two experts has both, with a ratio between 0 and 1"
        )
    return index


def two_experts(index: dict) -> bool:
    """Return whether the pipeline has a second transformer; [null, null] is none, as in TI2V-5B."""
    return any(index.get("transformer_2") or ())


def check_copied(src: pathlib.Path) -> None:
    """Check the tokenizer and the scheduler, which are copied, by loading them as sampling does.

    Raises `UserError` when they cannot be loaded.
    """
    copied_files(src)
    try:
        load_scheduler(src / "scheduler" / "scheduler_config.json")
        Tokenizer.load(src / "tokenizer")
    except (ConfigError, TokenizerError) as error:
        raise UserError(str(error)) from None


def copied_files(src: pathlib.Path) -> list[pathlib.Path]:
    """Return the files in the folders of `COPIED`.

    Links of a snapshot in the hub's cache to the cache's `blobs` folder are followed. Raises
    `UserError` on any other link that leaves the source, and on links to folders.
    """
    root, files = expand(src), []
    cache = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    for name in COPIED:
        if not (src / name).is_dir():
            raise UserError(f"{src / name} is missing: the download is not complete")
        for path in sorted([src / name, *(src / name).rglob("*")]):
            target = expand(path)
            if path.is_symlink() and (
                target.is_dir()
                or not target.exists()
                or not (target.is_relative_to(root) or target.is_relative_to(cache))
            ):
                raise UserError(
                    f"{path} is a link to {target}, which is "
                    f"{'a folder' if target.is_dir() else 'missing'} or outside the source, and is "
                    "not copied; put the files themselves there"
                )
            if path.is_file():
                files.append(path)
    return files


def check_destination(src: pathlib.Path, dst) -> None:
    """Raise `UserError` when writing `dst` would destroy the source or a target of its links."""
    check_apart(src, dst)
    for pattern in ("*", "*/*"):
        for path in src.glob(pattern):
            if path.is_symlink() and path.name != JOURNAL:
                check_apart(path, dst)

"""Folders that appear whole or not at all, and safetensors read one tensor at a time."""

import contextlib
import json
import os
import pathlib
import secrets
import shutil
from collections.abc import Iterator

import ml_dtypes  # noqa: F401 (registers bfloat16 with NumPy, for safetensors)
import numpy as np
from safetensors import SafetensorError, safe_open

from wan_jax.cli import UserError


@contextlib.contextmanager
def whole_folder(destination: pathlib.Path, overwrite: bool) -> Iterator[pathlib.Path]:
    """Yields a partial folder beside `destination`, renamed to it when the block ends without an exception.

    After a failure or Ctrl-C the partial folder is removed; one left by a killed process is removed by the next call
    for the same destination. An existing destination raises `UserError` without `overwrite`; with it, it stays until
    the new one is complete.
    """
    destination = destination.absolute()
    if destination.exists() and not overwrite:
        raise UserError(f"{destination} exists already; remove it, choose another --dst, or give --overwrite")
    destination.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{destination.name}.partial-"
    for leftover in destination.parent.glob(prefix + "*"):
        if not _alive(leftover.name.removeprefix(prefix).split("-")[0]):
            shutil.rmtree(leftover, ignore_errors=True)
    partial = destination.parent / f"{prefix}{os.getpid()}-{secrets.token_hex(3)}"
    partial.mkdir()
    try:
        yield partial
        for path in partial.rglob("*"):
            if path.is_file():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        old = destination.with_name(f"{prefix}{os.getpid()}-old")
        if destination.exists():
            destination.rename(old)
        partial.rename(destination)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _alive(pid: str) -> bool:
    """Whether a conversion that owns a partial folder still runs."""
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True


class Shards:
    """The tensors of one component folder, from one safetensors file or from several with an index.

    Raises `UserError` on a missing, truncated or damaged file, an index that names a missing shard, and a tensor that
    stands in two files.
    """

    def __init__(self, folder: pathlib.Path, stem: str):
        index = folder / f"{stem}.safetensors.index.json"
        if index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (json.JSONDecodeError, KeyError, TypeError):
                raise UserError(f"{index} is damaged: download it again") from None
        else:
            names = [f"{stem}.safetensors"]
        self.where, self.shapes = {}, {}
        for name in names:
            path = folder / name
            if not path.is_file():
                raise UserError(f"{path} is missing: the download is not complete")
            try:
                with safe_open(path, "numpy") as file:
                    for key in file.keys():
                        if key in self.where:
                            raise UserError(f"tensor {key} stands in {self.where[key].name} and in {name}: the folder "
                                            "mixes two checkpoints; download it again")
                        self.where[key] = path
                        self.shapes[key] = tuple(file.get_slice(key).get_shape())
            except SafetensorError as error:
                raise UserError(f"{path} is truncated or damaged ({error}): download it again") from None

    def read(self, key: str) -> np.ndarray:
        """One tensor; bfloat16 as ml_dtypes.bfloat16. Raises `UserError` when it holds NaN or infinity."""
        try:
            with safe_open(self.where[key], "numpy") as file:
                value = file.get_tensor(key)
        except SafetensorError as error:
            raise UserError(f"{self.where[key]} is damaged at {key} ({error}): download it again") from None
        if not np.isfinite(value.astype(np.float32) if value.dtype.itemsize < 4 else value).all():
            raise UserError(f"{self.where[key]}: tensor {key} holds NaN or infinity: the file is damaged")
        return value

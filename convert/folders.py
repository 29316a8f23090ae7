"""Folders that appear whole or not at all, and a component's safetensors read one tensor at a time."""

import contextlib
import glob
import json
import math
import os
import pathlib
import re
import shutil
import sys
import threading
from collections.abc import Iterator, Mapping

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from wan_jax.errors import UserError
from wan_jax.storage import folder_lock
from wan_jax.storage.model_dir import MANIFEST, previous_folder
from wan_jax.storage.paths import expand

DOWNLOAD = "download it again"
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}  # safetensors' names
LEFT_OUT = ".conversion.jsonl"  # the journal of a conversion, no part of the finished folder


def partial_folder(destination: pathlib.Path) -> pathlib.Path:
    """Return where `destination` is made."""
    destination = expand(destination)
    return destination.parent / f".{destination.name}.partial"


@contextlib.contextmanager
def whole_folder(
    destination: pathlib.Path, overwrite: bool, *, resumable: bool = False
) -> Iterator[pathlib.Path]:
    """Yield a partial folder beside `destination`, renamed to it when the block ends without an
    exception.

    Not resumable: the partial folder is removed after any failure, and one that a killed process
    left is emptied by the next call. Resumable: it is yielded with what it holds, and kept after
    Ctrl-C, a full disk or any other error but a `UserError` of the call that made it.

    An existing destination raises `UserError` without `overwrite`, and also with it when it is a
    file or a folder without a model. It stays until the new folder is complete: at every instant a
    complete one has the destination's name or that of `previous_folder`, from which the next call,
    or `recover`, takes it back. Another process that is at work on the same destination raises
    `UserError` as well.
    """
    destination = expand(destination)
    partial, previous = partial_folder(destination), previous_folder(destination)
    recover(destination)
    _check_destination(destination, overwrite)
    destination.parent.mkdir(parents=True, exist_ok=True)
    with folder_lock.locked_file(
        partial.with_name(partial.name + "-lock"), str(destination), "--dst"
    ):
        kept = resumable and partial.exists()
        partial.mkdir(exist_ok=True)
        _remove_leftovers(destination)
        if not resumable:
            for path in partial.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        try:
            yield partial
            for path in partial.rglob("*"):
                if path.is_file():
                    with open(path, "rb") as file:
                        os.fsync(file.fileno())
            # the work is complete: whatever goes wrong from here on, it is not thrown away
            kept = resumable
            _check_destination(destination, overwrite)
            try:
                if destination.exists():
                    destination.rename(previous)
                partial.rename(destination)
            except BaseException:
                recover(destination)
                raise
            (destination / LEFT_OUT).unlink(missing_ok=True)
            _remove_leftovers(destination)
        except BaseException as error:
            if not resumable or (isinstance(error, UserError) and not kept):
                shutil.rmtree(partial, ignore_errors=True)
            raise


def recover(destination: pathlib.Path) -> None:
    """Give the previous folder its name back when a process was killed while it replaced it."""
    previous = previous_folder(destination)
    if previous.exists() and not destination.exists():
        previous.rename(destination)


def _check_destination(destination: pathlib.Path, overwrite: bool) -> None:
    if not destination.exists():
        return
    if not overwrite:
        raise UserError(
            f"{destination} exists already; remove it, choose another --dst, or give --overwrite"
        )
    if not destination.is_dir() or (
        any(destination.iterdir())
        and not any((destination / name).is_file() for name in (MANIFEST, "model_index.json"))
    ):
        raise UserError(
            f"{destination} exists and holds no model, so --overwrite does not replace it; choose "
            "another --dst or remove it yourself"
        )


def _remove_leftovers(destination: pathlib.Path) -> None:
    """Remove the previous folder once the destination is there again, and what earlier removals
    left.

    A folder loses the name of `previous_folder` first, so that one under this name is always
    complete.
    """
    previous = previous_folder(destination)
    removed = previous.with_name(previous.name + "-removed")
    shutil.rmtree(removed, ignore_errors=True)
    if previous.exists() and destination.exists():
        previous.rename(removed)
        shutil.rmtree(removed, ignore_errors=True)


class Buffers(threading.local):
    """Memory that a thread uses again and again: getting hundreds of MB anew from the system for
    every tensor took longer than what was done with it.
    """

    def __init__(self):
        self.slots: dict[str, np.ndarray] = {}

    def take(self, slot: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An array of the slot's memory, not cleared; the slot's last one is overwritten with it."""
        size = math.prod(shape) * dtype.itemsize
        if slot not in self.slots or self.slots[slot].size < size:
            self.slots.pop(slot, None)
            self.slots[slot] = np.empty(size, np.uint8)
        return self.slots[slot][:size].view(dtype).reshape(shape)


def weight_files(folder: pathlib.Path, stem: str) -> tuple[list[str], pathlib.Path | None]:
    """Return (names, None) of a component's single safetensors file, or ([], index) of a sharded
    one.

    Names are those of Diffusers and transformers: STEM.safetensors or STEM.safetensors.index.json,
    of a variant STEM.VARIANT.safetensors or STEM.safetensors.index.VARIANT.json. Raises `UserError`
    when there is none, or several variants and no plain file.
    """
    index = folder / f"{stem}.safetensors.index.json"
    if index.is_file():
        return [], index
    if (folder / f"{stem}.safetensors").is_file():
        return [f"{stem}.safetensors"], None
    found = {}
    for path in sorted(folder.glob(f"{glob.escape(stem)}.*")):
        if match := re.fullmatch(
            r"\.(?:safetensors\.index\.(\w+)\.json|(\w+)\.safetensors)",
            path.name.removeprefix(stem),
        ):
            found[match[1] or match[2]] = ([], path) if match[1] else ([path.name], None)
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        raise UserError(
            f"{folder} has the variants {', '.join(found)} and no {stem}.safetensors: leave only "
            "the files of the one to convert"
        )
    if pickled := sorted(path.name for path in folder.glob("*.bin*")):
        raise UserError(
            f"{folder} holds only {pickled[0]}, a PyTorch file, which is not read: save it as "
            "safetensors (save_pretrained of Diffusers and transformers does)"
        )
    shards = sorted(path.name for path in folder.glob(f"{glob.escape(stem)}*-of-*.safetensors"))
    missing = index if shards else folder / f"{stem}.safetensors"
    raise UserError(f"{missing} is missing: the download is not complete")


class Shards:
    """The tensors of one component folder, from one safetensors file or from several with an index.

    Where the folder has no plain file but those of one variant (`.fp16.`), it is read. Raises
    `UserError` on a missing, truncated or damaged file, a tensor that stands in two files, a type
    that is not read, and an index that does not agree with the files: a missing shard, or a tensor
    that is not where it should be.
    """

    def __init__(self, folder: pathlib.Path, stem: str, types: Mapping[str, np.dtype] = DTYPES):
        names, index = weight_files(folder, stem)
        weight_map, total = None, None
        if index is not None:
            try:
                content = json.loads(index.read_text(encoding="utf-8"))
                weight_map = {str(k): str(v) for k, v in content["weight_map"].items()}
                total = (content.get("metadata") or {}).get("total_size")
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise UserError(f"{index} is damaged: {DOWNLOAD}") from None
            names = sorted(set(weight_map.values()))
        self.types = types
        self.files = [folder / name for name in names] + ([] if index is None else [index])
        self.where, self.shapes, self.dtypes, self.offsets = {}, {}, {}, {}
        for name in names:
            if not (folder / name).is_file():
                raise UserError(f"{folder / name} is missing: the download is not complete")
            self._add(folder / name)
        if index is not None:
            self._check_index(index, weight_map, total)

    def _add(self, path: pathlib.Path) -> None:
        try:
            # the library checks what we read
            with safe_open(path, "numpy") as file, open(path, "rb") as header:
                size = int.from_bytes(header.read(8), "little")
                places = json.loads(header.read(size))
                for key in file.offset_keys():  # as they lie in the file
                    if key in self.where:
                        raise UserError(
                            f"tensor {key} stands in {self.where[key].name} and in {path.name}: "
                            f"the folder mixes two checkpoints; {DOWNLOAD}"
                        )
                    part = file.get_slice(key)
                    if part.get_dtype() not in self.types:
                        raise UserError(
                            f"{path}: tensor {key} is stored as {part.get_dtype()}, which is not "
                            f"read ({', '.join(self.types)} are)"
                        )
                    self.where[key], self.shapes[key] = path, tuple(part.get_shape())
                    self.dtypes[key] = self.types[part.get_dtype()]
                    self.offsets[key] = 8 + size + places[key]["data_offsets"][0]
        except SafetensorError as error:
            raise UserError(f"{path} is truncated or damaged ({error}): {DOWNLOAD}") from None

    def _check_index(
        self, index: pathlib.Path, weight_map: dict[str, str], total: int | None
    ) -> None:
        found = {key: path.name for key, path in self.where.items()}
        for key in sorted(weight_map.keys() | found.keys()):
            if weight_map.get(key) != found.get(key):
                raise UserError(
                    f"{index} and its files disagree: tensor {key} is in "
                    f"{weight_map.get(key, 'no file')} by the index, and in "
                    f"{found.get(key, 'no file')} in truth; {DOWNLOAD}"
                )
        size = sum(math.prod(self.shapes[key]) * self.dtypes[key].itemsize for key in found)
        if total is not None and total != size:
            print(
                f"warning: {index}: total_size is {total}, the tensors of its "
                f"{len(self.files) - 1} files have {size} bytes; every tensor is where the index "
                "says, so they are read",
                file=sys.stderr,
            )

    def read(
        self, key: str, rows: range | None = None, buffers: Buffers | None = None
    ) -> np.ndarray:
        """One tensor or rows of it, as stored; in the buffers' slot "source" if they are given.

        Raises `UserError` when it holds NaN or infinity, or the file is shorter than it was.
        """
        path, shape, dtype, start = (
            self.where[key],
            self.shapes[key],
            self.dtypes[key],
            self.offsets[key],
        )
        if rows is not None:
            start += rows.start * math.prod(shape[1:]) * dtype.itemsize
            shape = (len(rows), *shape[1:])
        value = buffers.take("source", shape, dtype) if buffers else np.empty(shape, dtype)
        rest = memoryview(value.reshape(-1).view(np.uint8))
        with open(path, "rb", buffering=0) as file:
            file.seek(start)
            while rest:
                if not (n := file.readinto(rest[: 2**30])):
                    raise UserError(
                        f"{path} is truncated or damaged (it ends inside {key}): {DOWNLOAD}"
                    )
                rest = rest[n:]
        if not all_finite(value):
            raise UserError(f"{path}: tensor {key} holds NaN or infinity: the file is damaged")
        return value


def all_finite(value: np.ndarray) -> bool:
    """Whether no value is NaN or infinite; in blocks, and bfloat16 by its exponent's bits (NumPy's
    own is slow).
    """
    value = value.reshape(-1)
    for i in range(0, value.size, 2**20):
        block = value[i : i + 2**20]
        if block.dtype == ml_dtypes.bfloat16:
            if (np.bitwise_and(block.view(np.uint16), 0x7F80) == 0x7F80).any():
                return False
        elif not np.isfinite(block).all():
            return False
    return True

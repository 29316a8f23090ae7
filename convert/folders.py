"""Folders that appear whole or not at all, and a component's safetensors read one tensor at a time."""

import contextlib
import json
import math
import os
import pathlib
import shutil
import threading
from collections.abc import Iterator

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from wan_jax import folder_lock
from wan_jax.cli import UserError

DOWNLOAD = "download it again"
DTYPES = {"F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
          "BF16": np.dtype(ml_dtypes.bfloat16)}  # safetensors' names
LEFT_OUT = ".conversion.jsonl"  # the journal of a conversion, no part of the finished folder


def partial_folder(destination: pathlib.Path) -> pathlib.Path:
    """Where `destination` is made."""
    destination = destination.absolute()
    return destination.parent / f".{destination.name}.partial"


@contextlib.contextmanager
def whole_folder(destination: pathlib.Path, overwrite: bool, *, resumable: bool = False) -> Iterator[pathlib.Path]:
    """Yields a partial folder beside `destination`, renamed to it when the block ends without an exception.

    Not resumable: the partial folder is removed after any failure, and one that a killed process left is emptied by the
    next call. Resumable: it is yielded with what it holds, and kept after Ctrl-C, a full disk or any other error but a
    `UserError` of the call that made it.

    An existing destination raises `UserError` without `overwrite`; with it, it stays until the new one is complete. So
    does another process that is at work on the same destination.
    """
    destination = destination.absolute()
    if destination.exists() and not overwrite:
        raise UserError(f"{destination} exists already; remove it, choose another --dst, or give --overwrite")
    destination.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_folder(destination)
    old = partial.with_name(partial.name + "-old")
    with folder_lock.locked_file(partial.with_name(partial.name + "-lock"), str(destination), "--dst"):
        kept = resumable and partial.exists()
        partial.mkdir(exist_ok=True)
        if old.exists():  # killed between the two renames below
            shutil.rmtree(old, ignore_errors=True)
        if not resumable:
            for path in partial.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        try:
            yield partial
            for path in partial.rglob("*"):
                if path.is_file():
                    with open(path, "rb") as file:
                        os.fsync(file.fileno())
            if destination.exists():
                destination.rename(old)
            partial.rename(destination)
            (destination / LEFT_OUT).unlink(missing_ok=True)
            shutil.rmtree(old, ignore_errors=True)
        except BaseException as error:
            if not resumable or (isinstance(error, UserError) and not kept):
                shutil.rmtree(partial, ignore_errors=True)
            raise


class Buffers(threading.local):
    """Memory that a thread uses again and again: getting hundreds of MB anew from the system for every tensor took
    longer than what was done with it."""

    def __init__(self):
        self.slots: dict[str, np.ndarray] = {}

    def take(self, slot: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An array of the slot's memory, not cleared; the slot's last one is overwritten with it."""
        size = math.prod(shape) * dtype.itemsize
        if slot not in self.slots or self.slots[slot].size < size:
            self.slots.pop(slot, None)
            self.slots[slot] = np.empty(size, np.uint8)
        return self.slots[slot][:size].view(dtype).reshape(shape)


class Shards:
    """The tensors of one component folder, from one safetensors file or from several with an index.

    Raises `UserError` on a missing, truncated or damaged file, a tensor that stands in two files, a type that is not
    read, and an index that does not agree with the files: a missing shard, a tensor that is not where it should be, a
    wrong total_size.
    """

    def __init__(self, folder: pathlib.Path, stem: str):
        index = folder / f"{stem}.safetensors.index.json"
        weight_map, total, names = None, None, [f"{stem}.safetensors"]
        if index.is_file():
            try:
                content = json.loads(index.read_text())
                weight_map = {str(k): str(v) for k, v in content["weight_map"].items()}
                total = (content.get("metadata") or {}).get("total_size")
            except (ValueError, KeyError, TypeError, AttributeError):
                raise UserError(f"{index} is damaged: {DOWNLOAD}") from None
            names = sorted(set(weight_map.values()))
        self.files = [folder / name for name in names] + ([index] if weight_map is not None else [])
        self.where, self.shapes, self.dtypes, self.offsets = {}, {}, {}, {}
        for name in names:
            if not (folder / name).is_file():
                raise UserError(f"{folder / name} is missing: the download is not complete")
            self._add(folder / name)
        if weight_map is not None:
            self._check_index(index, weight_map, total)

    def _add(self, path: pathlib.Path) -> None:
        try:
            with safe_open(path, "numpy") as file, open(path, "rb") as header:  # the library checks what we read
                size = int.from_bytes(header.read(8), "little")
                places = json.loads(header.read(size))
                for key in file.offset_keys():  # as they lie in the file
                    if key in self.where:
                        raise UserError(f"tensor {key} stands in {self.where[key].name} and in {path.name}: the folder "
                                        f"mixes two checkpoints; {DOWNLOAD}")
                    part = file.get_slice(key)
                    if part.get_dtype() not in DTYPES:
                        raise UserError(f"{path}: tensor {key} is stored as {part.get_dtype()}, which is not read "
                                        f"({', '.join(DTYPES)} are)")
                    self.where[key], self.shapes[key] = path, tuple(part.get_shape())
                    self.dtypes[key] = DTYPES[part.get_dtype()]
                    self.offsets[key] = 8 + size + places[key]["data_offsets"][0]
        except SafetensorError as error:
            raise UserError(f"{path} is truncated or damaged ({error}): {DOWNLOAD}") from None

    def _check_index(self, index: pathlib.Path, weight_map: dict[str, str], total: int | None) -> None:
        found = {key: path.name for key, path in self.where.items()}
        for key in sorted(weight_map.keys() | found.keys()):
            if weight_map.get(key) != found.get(key):
                raise UserError(f"{index} and its files disagree: tensor {key} is in {weight_map.get(key, 'no file')} "
                                f"by the index, and in {found.get(key, 'no file')} in truth; {DOWNLOAD}")
        size = sum(math.prod(self.shapes[key]) * self.dtypes[key].itemsize for key in found)
        if total is not None and total != size:
            raise UserError(f"{index}: total_size is {total}, the tensors of its {len(self.files) - 1} files have "
                            f"{size} bytes; {DOWNLOAD}")

    def read(self, key: str, rows: range | None = None, buffers: Buffers | None = None) -> np.ndarray:
        """One tensor or rows of it, as stored; in the buffers' slot "source" if they are given.

        Raises `UserError` when it holds NaN or infinity, or the file is shorter than it was.
        """
        path, shape, dtype, start = self.where[key], self.shapes[key], self.dtypes[key], self.offsets[key]
        if rows is not None:
            start += rows.start * math.prod(shape[1:]) * dtype.itemsize
            shape = (len(rows), *shape[1:])
        value = buffers.take("source", shape, dtype) if buffers else np.empty(shape, dtype)
        rest = memoryview(value.reshape(-1).view(np.uint8))
        with open(path, "rb", buffering=0) as file:
            file.seek(start)
            while rest:
                if not (n := file.readinto(rest[:2**30])):
                    raise UserError(f"{path} is truncated or damaged (it ends inside {key}): {DOWNLOAD}")
                rest = rest[n:]
        if not all_finite(value):
            raise UserError(f"{path}: tensor {key} holds NaN or infinity: the file is damaged")
        return value


def all_finite(value: np.ndarray) -> bool:
    """Whether no value is NaN or infinite; in blocks, and bfloat16 by its exponent's bits (NumPy's own is slow)."""
    value = value.reshape(-1)
    for i in range(0, value.size, 2**20):
        block = value[i : i + 2**20]
        if block.dtype == ml_dtypes.bfloat16:
            if (np.bitwise_and(block.view(np.uint16), 0x7F80) == 0x7F80).any():
                return False
        elif not np.isfinite(block).all():
            return False
    return True

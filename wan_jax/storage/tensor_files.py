"""Safetensors files, read one tensor at a time and checked."""

import glob
import json
import math
import pathlib
import re
import sys
import threading
from collections.abc import Mapping

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from wan_jax.errors import UserError

DOWNLOAD = "download it again"
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}  # by their names in safetensors


class Buffers(threading.local):
    """Memory that a thread reuses for every tensor.

    Allocating hundreds of MB for every tensor took longer than the work on the tensor.
    """

    def __init__(self):
        self.slots: dict[str, np.ndarray] = {}

    def take(self, slot: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Return an uninitialised array in the slot's memory, which overwrites its last array."""
        size = math.prod(shape) * dtype.itemsize
        if slot not in self.slots or self.slots[slot].size < size:
            self.slots.pop(slot, None)
            self.slots[slot] = np.empty(size, np.uint8)
        return self.slots[slot][:size].view(dtype).reshape(shape)


def save_tensors(tensors: Mapping[str, np.ndarray], path, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file that has the permissions of any new file, by the process's umask.

    The library's own function makes files that their owner alone can read.
    """
    path = pathlib.Path(path)
    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path, metadata=dict(metadata))
    path.chmod(mode)


def weight_files(folder: pathlib.Path, stem: str) -> tuple[list[str], pathlib.Path | None]:
    """Return ([name], None) for a component in one safetensors file, or ([], index) if sharded.

    Names are those of Diffusers and transformers: STEM.safetensors or STEM.safetensors.index.json,
    for a variant STEM.VARIANT.safetensors or STEM.safetensors.index.VARIANT.json. Raises
    `UserError` when there is no file, or several variants and no plain file.
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
            f"{folder} has the variants {', '.join(found)} and no {stem}.safetensors: keep only "
            "the files of the variant to convert"
        )
    if pickled := sorted(path.name for path in folder.glob("*.bin*")):
        raise UserError(
            f"{folder} holds only {pickled[0]}, a PyTorch file, which is not supported: save it as "
            "safetensors (save_pretrained of Diffusers and transformers does)"
        )
    shards = sorted(path.name for path in folder.glob(f"{glob.escape(stem)}*-of-*.safetensors"))
    missing = index if shards else folder / f"{stem}.safetensors"
    raise UserError(f"{missing} is missing: the download is not complete")


class Shards:
    """The tensors of one component folder, from one safetensors file or from several with an index.

    If the folder has no plain file but those of one variant (`.fp16.`), the variant is read.

    Attributes: `files`, all files that are read; `where`, `shapes`, `dtypes` and `offsets`, the
    file, shape, dtype and byte offset in the file of every tensor, by key.

    Raises `UserError` on a missing, truncated or damaged file, a tensor that is in two files, an
    unsupported data type, and an index that does not agree with its files.
    """

    def __init__(self, folder: pathlib.Path, stem: str, types: Mapping[str, np.dtype] = DTYPES):
        names, index = weight_files(folder, stem)
        weight_map: dict[str, str] = {}
        total: int | None = None
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
        self.where: dict[str, pathlib.Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, np.dtype] = {}
        self.offsets: dict[str, int] = {}
        for name in names:
            if not (folder / name).is_file():
                raise UserError(f"{folder / name} is missing: the download is not complete")
            self._add(folder / name)
        if index is not None:
            self._check_index(index, weight_map, total)

    def _add(self, path: pathlib.Path) -> None:
        try:
            # the library checks the header that is parsed here
            with safe_open(path, "numpy") as file, open(path, "rb") as header:
                size = int.from_bytes(header.read(8), "little")
                positions = json.loads(header.read(size))
                for key in file.offset_keys():  # in the order of the file
                    if key in self.where:
                        raise UserError(
                            f"tensor {key} is in {self.where[key].name} and in {path.name}: "
                            f"the folder mixes two checkpoints; {DOWNLOAD}"
                        )
                    tensor = file.get_slice(key)
                    if tensor.get_dtype() not in self.types:
                        raise UserError(
                            f"{path}: tensor {key} has the type {tensor.get_dtype()}, which is not "
                            f"supported ({', '.join(self.types)} are)"
                        )
                    self.where[key] = path
                    self.shapes[key] = tuple(tensor.get_shape())
                    self.dtypes[key] = self.types[tensor.get_dtype()]
                    self.offsets[key] = 8 + size + positions[key]["data_offsets"][0]
        except SafetensorError as error:
            raise UserError(f"{path} is truncated or damaged ({error}): {DOWNLOAD}") from None

    def _check_index(
        self, index: pathlib.Path, weight_map: dict[str, str], total: int | None
    ) -> None:
        found = {key: path.name for key, path in self.where.items()}
        for key in sorted(weight_map.keys() | found.keys()):
            if weight_map.get(key) != found.get(key):
                raise UserError(
                    f"{index} and its files disagree: by the index tensor {key} is in "
                    f"{weight_map.get(key, 'no file')}, but it is in "
                    f"{found.get(key, 'no file')}; {DOWNLOAD}"
                )
        size = sum(math.prod(self.shapes[key]) * self.dtypes[key].itemsize for key in found)
        if total is not None and total != size:
            print(
                f"warning: {index}: total_size is {total}, the tensors of its "
                f"{len(self.files) - 1} files have {size} bytes; every tensor is where the index "
                "lists it, so they are read anyway",
                file=sys.stderr,
            )

    def read(
        self, key: str, rows: range | None = None, buffers: Buffers | None = None
    ) -> np.ndarray:
        """Return one tensor, or rows of it, in the stored dtype.

        With `buffers` the array is in their slot "source". Raises `UserError` when the tensor
        holds NaN or infinity, or the file has become shorter.
        """
        path, shape = self.where[key], self.shapes[key]
        dtype, start = self.dtypes[key], self.offsets[key]
        if rows is not None:
            start += rows.start * math.prod(shape[1:]) * dtype.itemsize
            shape = (len(rows), *shape[1:])
        value = buffers.take("source", shape, dtype) if buffers else np.empty(shape, dtype)
        rest = value.reshape(-1).view(np.uint8).data
        with open(path, "rb", buffering=0) as file:
            file.seek(start)
            while rest:
                count = file.readinto(rest[: 2**30])
                if not count:
                    raise UserError(
                        f"{path} is truncated or damaged (it ends inside {key}): {DOWNLOAD}"
                    )
                rest = rest[count:]
        if not all_finite(value):
            raise UserError(f"{path}: tensor {key} holds NaN or infinity: the file is damaged")
        return value


def all_finite(value: np.ndarray) -> bool:
    """Return whether no value is NaN or infinite.

    Works in blocks, and for bfloat16 by the exponent's bits, since `np.isfinite` is slow there.
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

"""The arrays of one component as an orbax checkpoint that is written and read one layer at a time.

Orbax saves a whole tree, so the tree must fit in memory. On disk its checkpoint is one Zarr array
per leaf and a few small files of metadata. `create` lets orbax save a tree of the same names with
one value in each, then gives every leaf its real shape through TensorStore, and `ArrayStore.write`
fills them in any order. Orbax restores the result like any other checkpoint, each device reading
its shards.

An array with a layer axis (axis 0 of the modules run by scan) has one chunk, which is one file, per
layer; larger ones than `CHUNK` bytes are split further. Chunks are not compressed, because trained
weights hardly get smaller. So a file can be read directly, and is compared with its digest
(`wan_jax.storage.integrity`) while it is read.
"""

import itertools
import math
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from wan_jax.errors import UserError
from wan_jax.storage import integrity
from wan_jax.storage.paths import expand
from wan_jax.storage.weight_changes import WeightChanges

CHUNK = 2**28  # bytes
CHUNK_FILE = re.compile(r"(.*/)?\d+(\.\d+)*")  # all other files are metadata
# Files of orbax that contain the time of writing; they are not read here.
TIMES = ("_CHECKPOINT_METADATA", "commit_success.txt")
CONTEXT = {"file_io_concurrency": {"limit": 4}}
CONVERT_AGAIN = "convert the model again with python -m convert.from_diffusers --overwrite"


class StoreError(UserError):
    """The store is incomplete or damaged."""


def chunk_shape(shape: tuple[int, ...], itemsize: int, stacked: bool) -> tuple[int, ...]:
    """Return the shape of a chunk: one layer of a stacked array, all of another one. Chunks above
    `CHUNK` bytes are split evenly, leading axes first.
    """
    chunk = [1, *shape[1:]] if stacked else list(shape)
    for axis, n in enumerate(chunk):
        pieces = -(-math.prod(chunk) * itemsize // CHUNK)
        chunk[axis] = -(-n // min(n, pieces))
    return tuple(chunk)


def create(
    path: pathlib.Path, arrays: Mapping[str, tuple[tuple[int, ...], np.dtype, bool]]
) -> "ArrayStore":
    """Create a checkpoint at `path`, to be filled. arrays: {name: (shape, dtype, stacked over
    layers)}.
    """
    tree = {name: np.zeros(1, dtype) for name, (_, dtype, _) in arrays.items()}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave(tree), force=True)
    context = ts.Context(CONTEXT)
    opening = {}
    for name, (shape, dtype, stacked) in arrays.items():
        dtype = np.dtype(dtype)
        metadata = {
            "shape": list(shape),
            "chunks": list(chunk_shape(shape, dtype.itemsize, stacked)),
            "compressor": None,
            "order": "C",
            "dimension_separator": ".",
        }
        opening[name] = ts.open(
            _spec(path, name) | {"metadata": metadata, "dtype": dtype.name},
            create=True,
            delete_existing=True,
            context=context,
        )
    return ArrayStore(path, {name: future.result() for name, future in opening.items()})


def _spec(path: pathlib.Path, name: str) -> dict:
    return {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": f"{path / name}/"},
        "store_data_equal_to_fill_value": True,
    }


def _write_file(path: pathlib.Path, value: np.ndarray) -> None:
    """Write a file that appears complete, once it is on disk."""
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb", buffering=0) as file:
        rest = value.reshape(-1).view(np.uint8).data
        while rest:
            rest = rest[file.write(rest[: 2**30]) :]
        os.fsync(file.fileno())
    partial.replace(path)


class ArrayStore:
    """The arrays of an existing checkpoint.

    Args:
        path: folder of the checkpoint.
        arrays: the open arrays; None opens them.
        files: size and digest of every file by its path below `path`. Metadata are compared with
            them at once, values when they are read. None: only sizes are checked.

    Raises `StoreError` when metadata are missing or damaged.
    """

    def __init__(
        self,
        path: pathlib.Path,
        arrays: Mapping[str, ts.TensorStore] | None = None,
        files: integrity.Files | None = None,
    ):
        self.path = expand(path)
        self._files = files
        metadata = {
            name: entry for name, entry in (files or {}).items() if not CHUNK_FILE.fullmatch(name)
        }
        if found := integrity.problem(self.path, metadata):
            raise StoreError(f"{self.path} is missing or damaged: {found}")
        self._arrays = dict(self._open() if arrays is None else arrays)
        self.shapes = {name: tuple(array.shape) for name, array in self._arrays.items()}
        self.dtypes = {
            name: np.dtype(array.dtype.numpy_dtype) for name, array in self._arrays.items()
        }

    def _open(self) -> dict[str, ts.TensorStore]:
        try:
            # orbax takes any path, although its annotation names epath.Path
            names = ocp.PyTreeCheckpointHandler().metadata(cast(Any, self.path)).tree.keys()
            context = ts.Context(CONTEXT)
            opening = {
                name: ts.open(_spec(self.path, name), open=True, context=context) for name in names
            }
            return {name: future.result() for name, future in opening.items()}
        except (ValueError, KeyError, OSError, TypeError, AttributeError) as error:
            raise StoreError(
                f"{self.path} is missing or damaged ({str(error).splitlines()[0][:200]})"
            ) from None

    def chunk_files(self, name: str, layer: int | None = None) -> list[pathlib.Path]:
        """Return the files of an array, or of one of its layers."""
        shape, chunk = self.shapes[name], self._chunk(name)
        counts = [range(-(-n // c)) for n, c in zip(shape, chunk)]
        if layer is not None:
            counts[0] = range(layer, layer + 1)
        return [
            self.path / name / ".".join(map(str, index)) for index in itertools.product(*counts)
        ]

    def is_written(self, name: str, layer: int | None = None) -> bool:
        """Return whether all files of an array, or of one of its layers, exist and have the right
        size.
        """
        size = math.prod(self._chunk(name)) * self.dtypes[name].itemsize
        return all(
            file.is_file() and file.stat().st_size == size for file in self.chunk_files(name, layer)
        )

    def check_whole(self) -> None:
        """Raise `StoreError` when a file of values is missing, which would read as zeros, or
        truncated.
        """
        if broken := [name for name in self.shapes if not self.is_written(name)]:
            raise StoreError(
                f"{self.path} is not whole: files of {len(broken)} arrays are missing or truncated "
                f"({', '.join(broken[:3])})"
            )

    def _chunk(self, name: str) -> tuple[int, ...]:
        return tuple(cast(Sequence[int], self._arrays[name].chunk_layout.read_chunk.shape))

    def write(self, name: str, value: np.ndarray, layer: int | None = None, row: int = 0) -> None:
        """Write one layer, or rows of an array without layers from `row` on; on disk on return.

        value: contiguous, in the array's dtype. An uncompressed chunk is its values in memory
        order, so complete chunks are written to their files directly. TensorStore would copy them
        first, which took twice as long.
        """
        head = () if layer is None else (layer,)
        chunk = self._chunk(name)[len(head) :]
        if chunk[1:] == value.shape[1:] and len(value) % chunk[0] == row % chunk[0] == 0:
            for first in range(0, len(value), chunk[0]):
                index = (*head, (row + first) // chunk[0], *[0] * (len(chunk) - 1))
                _write_file(
                    self.path / name / ".".join(map(str, index)), value[first : first + chunk[0]]
                )
        else:
            array = self._arrays[name]
            target = array[layer] if layer is not None else array[row : row + len(value)]
            target.write(value, can_reference_source_data_indefinitely=True).result()

    def read(self, name: str, layer: int | None = None, rows: slice = slice(None)) -> np.ndarray:
        """Return an array, one layer of it, or rows of one without layers, as stored. Raises
        `StoreError`.
        """
        shape = self.shapes[name]
        first = rows if layer is None else slice(layer, layer + 1)
        value = self._slice(
            name, (first, *[slice(None)] * (len(shape) - 1))[: len(shape)], self.dtypes[name]
        )
        return value if layer is None else value[0]

    def place(
        self,
        name: str,
        dtype,
        sharding: jax.sharding.Sharding,
        changes: WeightChanges | None = None,
        layer: int | None = None,
    ) -> jax.Array:
        """Return an array, or one of its layers, in `dtype` on the devices of `sharding`. Reads only the files of this
        process's shards, and copies each shard once. Raises `StoreError`.

        changes: what is added in fp32 before the values are rounded to `dtype`.
        """
        changed = changes is not None and name in changes.terms
        first = () if layer is None else (slice(layer, layer + 1),)
        shards = {}

        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None  # as JAX asserts
            key = tuple((s.start, s.stop) for s in index)
            index = (*first, *index)
            if key not in shards and changes is not None and changed:
                shards[key] = changes.merge_slice(
                    name,
                    self.shapes[name],
                    np.dtype(dtype),
                    index,
                    lambda index: self._slice(name, index, np.dtype(np.float32)),
                )
            elif key not in shards:
                shards[key] = self._slice(name, index, np.dtype(dtype))
            return shards[key] if layer is None else shards[key][0]

        return jax.make_array_from_callback(self.shapes[name][len(first) :], sharding, shard)

    def _slice(self, name: str, index: Sequence[slice], dtype: np.dtype) -> np.ndarray:
        """Return a slice of an array, of step 1. Every file with some of it is read once, and
        completely, because its digest is checked.
        """
        chunk = self._chunk(name)
        stored = self.dtypes[name]
        spans = [s.indices(n)[:2] for s, n in zip(index, self.shapes[name], strict=True)]
        out = np.empty([stop - start for start, stop in spans], dtype)

        def copy(chunk_index: tuple[int, ...]) -> None:
            """Copy the values of one file that are in the slice to `out`."""
            in_file = []
            in_out = []
            for i, n, (start, stop) in zip(chunk_index, chunk, spans):
                low, high = max(start, i * n), min(stop, (i + 1) * n)
                in_file.append(slice(low - i * n, high - i * n))
                in_out.append(slice(low - start, high - start))
            target = out[tuple(in_out)]
            direct = dtype == stored and target.shape == chunk and target.flags.c_contiguous
            values = target if direct else np.empty(chunk, stored)
            file = ".".join(map(str, chunk_index)) or "0"
            expected = None if self._files is None else self._files.get(f"{name}/{file}", (0, 0))
            try:
                integrity.read_into(
                    self.path / name / file, values.reshape(-1).view(np.uint8).data, expected
                )
            except integrity.Damaged as error:
                raise StoreError(f"{error}; {CONVERT_AGAIN}") from None
            if not direct:
                target[...] = values[tuple(in_file)]

        wanted = list(
            itertools.product(*(range(a // n, -(-b // n)) for n, (a, b) in zip(chunk, spans)))
        )
        if len(wanted) == 1:
            copy(wanted[0])
        else:
            with ThreadPoolExecutor(integrity.WORKERS) as pool:
                list(pool.map(copy, wanted))
        return out

"""The arrays of one component as an orbax checkpoint that is written and read one layer at a time.

Orbax saves a tree at once, so the tree must fit in memory. On disk its checkpoint is one Zarr array a leaf beside a few
small files of metadata: `create` lets orbax save a tree of the same names with one value in each, then gives every
leaf its true shape through TensorStore, and `ArrayStore.write` fills it in any order. Orbax restores the result like
any other checkpoint, each device reading its part.

An array over layers (axis 0 of the modules run by scan) has a chunk, which is one file, for each layer; what is larger
than `CHUNK` bytes is split further. Chunks are not compressed: trained weights hardly get smaller.
"""

import itertools
import math
import os
import pathlib
from collections.abc import Mapping

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from wan_jax.cli import UserError

CHUNK = 2**28  # bytes
CONTEXT = {"file_io_concurrency": {"limit": 4}}


class StoreError(UserError):
    """The store is incomplete or damaged."""


def chunk_shape(shape: tuple[int, ...], itemsize: int, stacked: bool) -> tuple[int, ...]:
    """One layer of a stacked array, the whole of another; above `CHUNK` bytes split evenly, leading axes first."""
    chunk = [1, *shape[1:]] if stacked else list(shape)
    for axis, n in enumerate(chunk):
        parts = -(-math.prod(chunk) * itemsize // CHUNK)
        chunk[axis] = -(-n // min(n, parts))
    return tuple(chunk)


def create(path: pathlib.Path, arrays: Mapping[str, tuple[tuple[int, ...], np.dtype, bool]]) -> "ArrayStore":
    """A new checkpoint at `path`, to be filled. arrays: {name: (shape, dtype, stacked over layers)}."""
    tree = {name: np.zeros(1, dtype) for name, (_, dtype, _) in arrays.items()}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave(tree), force=True)
    context, opening = ts.Context(CONTEXT), {}
    for name, (shape, dtype, stacked) in arrays.items():
        dtype = np.dtype(dtype)
        metadata = {"shape": list(shape), "chunks": list(chunk_shape(shape, dtype.itemsize, stacked)),
                    "compressor": None, "order": "C", "dimension_separator": "."}
        opening[name] = ts.open(_spec(path, name) | {"metadata": metadata, "dtype": dtype.name}, create=True,
                                delete_existing=True, context=context)
    return ArrayStore(path, {name: future.result() for name, future in opening.items()})


def _spec(path: pathlib.Path, name: str) -> dict:
    return {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{path / name}/"},
            "store_data_equal_to_fill_value": True}


def _write_file(path: pathlib.Path, value: np.ndarray) -> None:
    """A file that appears whole, when it is on the disk."""
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb", buffering=0) as file:
        rest = memoryview(value.reshape(-1).view(np.uint8))
        while rest:
            rest = rest[file.write(rest[:2**30]):]
        os.fsync(file.fileno())
    partial.replace(path)


class ArrayStore:
    """The arrays of an existing checkpoint. Raises `StoreError` when its metadata or that of an array is not there."""

    def __init__(self, path: pathlib.Path, arrays: Mapping[str, ts.TensorStore] | None = None):
        self.path = path.absolute()
        self._arrays = dict(self._open() if arrays is None else arrays)
        self.shapes = {name: tuple(array.shape) for name, array in self._arrays.items()}
        self.dtypes = {name: np.dtype(array.dtype.numpy_dtype) for name, array in self._arrays.items()}

    def _open(self) -> dict[str, ts.TensorStore]:
        try:
            names = ocp.PyTreeCheckpointHandler().metadata(self.path).tree.keys()
            context = ts.Context(CONTEXT)
            opening = {name: ts.open(_spec(self.path, name), open=True, context=context) for name in names}
            return {name: future.result() for name, future in opening.items()}
        except (ValueError, KeyError, OSError, TypeError, AttributeError) as error:
            raise StoreError(f"{self.path} is missing or damaged ({str(error).splitlines()[0][:200]})") from None

    def chunk_files(self, name: str, layer: int | None = None) -> list[pathlib.Path]:
        """The files of an array, or of one of its layers."""
        shape, chunk = self.shapes[name], self._chunk(name)
        counts = [range(-(-n // c)) for n, c in zip(shape, chunk)]
        if layer is not None:
            counts[0] = range(layer, layer + 1)
        return [self.path / name / ".".join(map(str, index)) for index in itertools.product(*counts)]

    def is_written(self, name: str, layer: int | None = None) -> bool:
        """Whether all files of an array, or of one of its layers, are there and of the right size."""
        size = math.prod(self._chunk(name)) * self.dtypes[name].itemsize
        return all(file.is_file() and file.stat().st_size == size for file in self.chunk_files(name, layer))

    def check_whole(self) -> None:
        """Raises `StoreError` when a file of values is missing, which would read as zeros, or truncated."""
        if broken := [name for name in self.shapes if not self.is_written(name)]:
            raise StoreError(f"{self.path} is not whole: files of {len(broken)} arrays are missing or truncated "
                             f"({', '.join(broken[:3])})")

    def _chunk(self, name: str) -> tuple[int, ...]:
        return tuple(self._arrays[name].chunk_layout.read_chunk.shape)

    def write(self, name: str, value: np.ndarray, layer: int | None = None, row: int = 0) -> None:
        """Writes one layer, or the rows from `row` on of an array without layers; it is on the disk on return.

        value: contiguous, in the array's dtype. A chunk without compression is its values as they lie in memory; whole
        ones go to their files directly, where TensorStore would copy them first, which halved the speed.
        """
        head = () if layer is None else (layer,)
        chunk = self._chunk(name)[len(head):]
        if chunk[1:] == value.shape[1:] and len(value) % chunk[0] == row % chunk[0] == 0:
            for first in range(0, len(value), chunk[0]):
                index = (*head, (row + first) // chunk[0], *[0] * (len(chunk) - 1))
                _write_file(self.path / name / ".".join(map(str, index)), value[first : first + chunk[0]])
        else:
            array = self._arrays[name]
            target = array[layer] if layer is not None else array[row : row + len(value)]
            target.write(value, can_reference_source_data_indefinitely=True).result()

    def read(self, name: str, layer: int | None = None, rows: slice = slice(None)) -> np.ndarray:
        """An array, one layer of it, or rows of one without layers, as stored."""
        array = self._arrays[name]
        return (array[layer] if layer is not None else array[rows]).read().result()

    def place(self, name: str, dtype, sharding: jax.sharding.Sharding) -> jax.Array:
        """An array on the devices of `sharding`, in `dtype`. Reads this process's shards only, one copy of each."""
        array, parts = ts.cast(self._arrays[name], np.dtype(dtype).name), {}

        def part(index: tuple[slice, ...]) -> np.ndarray:
            key = tuple((s.start, s.stop) for s in index)
            if key not in parts:
                parts[key] = array[index].read().result()
            return parts[key]

        return jax.make_array_from_callback(self.shapes[name], sharding, part)

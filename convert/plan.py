"""Plan of what a conversion will write, made from the files' headers before data is read.

`plan_component` checks a component of the source against its config. `Plan.pieces` then yields a
tensor as it will be stored, at most a few hundred MB at a time; writing and `--check` share it.
"""

import dataclasses
import math
import pathlib
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from wan_jax.errors import UserError
from wan_jax.models import config as config_lib
from wan_jax.models import flat_params
from wan_jax.storage import array_store, key_table, model_dir
from wan_jax.storage.tensor_files import Buffers, Shards, all_finite

STEMS = {
    "transformer": "diffusion_pytorch_model",
    "transformer_2": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
BUFFERS = Buffers()
TILE = 32  # columns transposed at once: 5.8 GB/s on one core, NumPy's own copy 1.2 GB/s


@dataclasses.dataclass(frozen=True)
class Plan:
    """The conversion of one component.

    Attributes:
        component: 'transformer', 'transformer_2', 'vae' or 'text_encoder'.
        source: the folder in Diffusers layout.
        shards: the component's tensors in the source.
        table: its key table in the order of the source's files, which are so read in one pass.
        arrays: what will be written, {path: (shape, dtype, whether layers are stacked)}.
    """

    component: str
    source: pathlib.Path
    shards: Shards
    table: list[key_table.Entry]
    arrays: dict[str, tuple[tuple[int, ...], np.dtype, bool]]

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape, _, _ in self.arrays.values())

    @property
    def size(self) -> int:
        """Bytes that will be written."""
        return sum(self.stored_bytes(entry) for entry in self.table)

    def stored_bytes(self, entry: key_table.Entry) -> int:
        """Return the bytes of one source tensor as it will be stored."""
        return math.prod(entry.shape) * self.arrays[entry.path][1].itemsize

    def pieces(self, entry: key_table.Entry) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first row, contiguous array as it will be stored) for one tensor of the source.

        A tensor comes in one piece, or in pieces of `array_store.chunk_shape` if its layout does
        not change and no layers are stacked (the embedding of 4.2 GB). An array is valid until the
        thread asks any plan for the next one, since it is in the thread's `Buffers`. Raises
        `UserError` on NaN, infinity, a value too large for the stored type and a damaged file.
        """
        shape, dtype, stacked = self.arrays[entry.path]
        rows = array_store.chunk_shape(shape, dtype.itemsize, stacked)[0]
        if stacked or not entry.same or rows == shape[0]:
            yield 0, self._as_stored(entry, self.shards.read(entry.key, buffers=BUFFERS), dtype)
            return
        for row in range(0, shape[0], rows):
            piece = self.shards.read(entry.key, range(row, min(row + rows, shape[0])), BUFFERS)
            yield row, self._as_stored(entry, piece, dtype)

    def _as_stored(self, entry: key_table.Entry, value: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """Return a source tensor, or rows of it, contiguous in our layout and dtype.

        Values are rounded to nearest even.
        """
        name = f"{self.shards.where[entry.key]}: tensor {entry.key}"
        if value.dtype == dtype == np.float64:
            rounded(value, np.dtype(np.float32), name)  # a check, since loading rounds to float32
        if value.dtype != dtype:
            value = rounded(value, dtype, name, BUFFERS.take("cast", value.shape, dtype))
        ours = entry.to_ours(value)
        if ours.flags.c_contiguous:
            return ours
        return contiguous(ours, BUFFERS.take("ours", ours.shape, dtype))


def rounded(
    value: np.ndarray, dtype: np.dtype, name: str, out: np.ndarray | None = None
) -> np.ndarray:
    """Return `value` rounded to `dtype`, in `out` if given.

    name: the tensor's, for the message. Raises `UserError` when a finite value becomes infinite.
    """
    if value.dtype == dtype:
        return value
    out = np.empty(value.shape, dtype) if out is None else out
    with np.errstate(over="ignore"):
        np.copyto(out, value, casting="unsafe")
    if not np.can_cast(value.dtype, dtype) and not all_finite(out):
        fix = (
            "models compute in float32 at most, so the tensor is damaged"
            if value.dtype == np.float64
            else f"--dtype float32 (or COMPONENT=float32, see --help) keeps {value.dtype} whole"
        )
        raise UserError(
            f"{name} is {value.dtype} and has values up to {np.abs(value).max():.3g}, beyond the "
            f"largest of {np.dtype(dtype)}; {fix}"
        )
    return out


def contiguous(value: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Return the array in C order, in `out` if given.

    A transposed matrix is copied in tiles that stay in the cache, which is faster than NumPy.
    """
    if out is None and value.flags.c_contiguous:
        return value
    out = np.empty(value.shape, value.dtype) if out is None else out
    unsigned = f"u{value.dtype.itemsize}"
    target, source = out.view(unsigned), value.view(unsigned)
    if value.ndim != 2 or value.flags.c_contiguous:
        target[...] = source
    else:
        for column in range(0, value.shape[1], TILE):
            target[:, column : column + TILE] = source[:, column : column + TILE]
    return out


def parse_dtypes(text: str) -> dict[str, str]:
    """Parse --dtype, 'bfloat16' or 'bfloat16,text_encoder=float32', for every component.

    Returns {component: 'source', 'float32' or 'bfloat16'}. The VAE stays in float32 unless it is
    named or the type is 'source'. Raises `UserError` on an unknown type or component.
    """
    known = ("source", *DTYPES)
    parts = [part.strip() for part in text.split(",")]
    general = [part for part in parts if "=" not in part]
    named = dict(part.split("=", 1) for part in parts if "=" in part)
    bad = [dtype for dtype in (*general, *named.values()) if dtype not in known]
    bad += [component for component in named if component not in STEMS]
    if bad or len(general) > 1:
        raise UserError(
            f"invalid --dtype={text}: {bad[0] if bad else 'two general types'!r}; expected one of "
            f"{', '.join(known)}, with exceptions such as text_encoder=float32 after a comma "
            f"(components: {', '.join(STEMS)})"
        )
    default = general[0] if general else "source"
    dtypes = dict.fromkeys(STEMS, default)
    if default == "bfloat16":
        dtypes["vae"] = "float32"
    return dtypes | named


def plan_component(component: str, src: pathlib.Path, dtype: str) -> Plan:
    """Return the plan of one component, from its config and the headers of its files.

    dtype: 'source', 'float32' or 'bfloat16'; what the model keeps in float32 stays in it. Raises
    `UserError` when the source is incomplete, damaged, or not the model its config describes.
    """
    if not (src / component).is_dir():
        raise UserError(f"{src / component} is missing: the download is not complete")
    shards = Shards(src / component, STEMS[component])
    try:
        config = config_lib.load(
            model_dir.COMPONENTS[component][0], src / component / "config.json"
        )
        model_dtype = DTYPES["float32" if dtype == "source" else dtype]
        like = flat_params.flatten(model_dir.abstract(component, config, dtype=model_dtype)[1])
        table = key_table.entries(
            component,
            {k: v.shape for k, v in like.items()},
            getattr(config, "patch_size", None) or (1, 2, 2),
        )
        key_table.check_coverage(component, table, shards.shapes)
    except (config_lib.ConfigError, key_table.KeyTableError) as error:
        raise UserError(f"{src}: {error}") from None
    dtypes = {k: np.dtype(v.dtype) for k, v in like.items()}
    # 'source' keeps each tensor's own type; stacked layers of different types get a common one
    if dtype == "source":
        stored: dict[str, list[np.dtype]] = {}
        for entry in table:
            stored.setdefault(entry.path, []).append(shards.dtypes[entry.key])
        dtypes = {k: np.result_type(*set(v)) for k, v in stored.items()}
    stacked = {entry.path for entry in table if entry.layer is not None}
    order = {key: i for i, key in enumerate(shards.where)}
    table.sort(key=lambda e: order[e.key])
    return Plan(
        component,
        src,
        shards,
        table,
        {k: (v.shape, dtypes[k], k in stacked) for k, v in like.items()},
    )

"""What a conversion will write, known from the headers alone, before data is read.

`plan_component` checks a component of the source against its config; `Plan.pieces` then yields one
tensor as it will be stored, at most a few hundred MB at a time. Writing and `--check` share it.
"""

import dataclasses
import math
import pathlib
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from convert import key_table
from convert.folders import Buffers, Shards, all_finite
from wan_jax.errors import UserError
from wan_jax.models import config as config_lib
from wan_jax.models import flat_params
from wan_jax.storage import array_store, model_dir

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
    """One component's conversion."""

    component: str
    source: pathlib.Path
    shards: Shards
    # in the order of the source's files, so that they are read in one pass
    table: list[key_table.Entry]
    # ours: {path: (shape, dtype, stacked over layers)}
    arrays: dict[str, tuple[tuple[int, ...], np.dtype, bool]]

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape, _, _ in self.arrays.values())

    @property
    def size(self) -> int:
        """Bytes of our arrays."""
        return sum(self.stored_bytes(entry) for entry in self.table)

    def stored_bytes(self, entry: key_table.Entry) -> int:
        """Bytes of one source tensor in our layout."""
        return math.prod(entry.shape) * self.arrays[entry.path][1].itemsize

    def pieces(self, entry: key_table.Entry) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, contiguous array as stored) for one tensor of the source: whole, or, where
        the layout is the same and no layers are stacked (the 4.2 GB embedding), in the parts of
        `array_store.chunk_shape`.

        An array is good until this thread asks for the next one of any plan: it lies in the
        thread's `Buffers`. Raises `UserError` on NaN, infinity, a value too large for the type to
        write and a damaged file.
        """
        shape, dtype, stacked = self.arrays[entry.path]
        rows = array_store.chunk_shape(shape, dtype.itemsize, stacked)[0]
        if stacked or not entry.same or rows == shape[0]:
            yield 0, self._as_stored(entry, self.shards.read(entry.key, buffers=BUFFERS), dtype)
            return
        for row in range(0, shape[0], rows):
            part = self.shards.read(entry.key, range(row, min(row + rows, shape[0])), BUFFERS)
            yield row, self._as_stored(entry, part, dtype)

    def _as_stored(self, entry: key_table.Entry, value: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """A source tensor, or rows of it, in our layout and dtype (rounded to nearest even),
        contiguous.
        """
        name = f"{self.shards.where[entry.key]}: tensor {entry.key}"
        if value.dtype == dtype == np.float64:
            rounded(value, np.dtype(np.float32), name)  # as it will be when the model is loaded
        if value.dtype != dtype:
            value = rounded(value, dtype, name, BUFFERS.take("cast", value.shape, dtype))
        ours = entry.to_ours(value)
        return (
            ours
            if ours.flags.c_contiguous
            else contiguous(ours, BUFFERS.take("ours", ours.shape, dtype))
        )


def rounded(
    value: np.ndarray, dtype: np.dtype, name: str, out: np.ndarray | None = None
) -> np.ndarray:
    """Return `value` rounded to `dtype`, in `out` if given. Raise `UserError` when a finite value
    becomes infinite.
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
    """The array in C order, in `out` if given; copies a transposed matrix faster than NumPy: in
    tiles that stay in the cache.
    """
    if out is None and value.flags.c_contiguous:
        return value
    out = np.empty(value.shape, value.dtype) if out is None else out
    a, b = (x.view(f"u{x.dtype.itemsize}") for x in (out, value))
    if value.ndim != 2 or value.flags.c_contiguous:
        a[...] = b
    else:
        for i in range(0, value.shape[1], TILE):
            a[:, i : i + TILE] = b[:, i : i + TILE]
    return out


def parse_dtypes(text: str) -> dict[str, str]:
    """'bfloat16' or 'bfloat16,text_encoder=float32' to {component: 'source' | 'float32' |
    'bfloat16'}.

    The VAE stays in float32 unless it is named or the type is 'source'. Raises `UserError` on other
    words.
    """
    known = ("source", *DTYPES)
    parts = [part.strip() for part in text.split(",")]
    general = [part for part in parts if "=" not in part]
    named = dict(part.split("=", 1) for part in parts if "=" in part)
    bad = [v for v in (*general, *named.values()) if v not in known] + [
        k for k in named if k not in STEMS
    ]
    if bad or len(general) > 1:
        raise UserError(
            f"--dtype={text}: {bad[0] if bad else 'two general types'!r} is not understood; give "
            f"one of {', '.join(known)}, and exceptions such as text_encoder=float32 after a comma "
            f"(components: {', '.join(STEMS)})"
        )
    default = general[0] if general else "source"
    return {
        c: named.get(c, "float32" if c == "vae" and default == "bfloat16" else default)
        for c in STEMS
    }


def plan_component(component: str, src: pathlib.Path, dtype: str) -> Plan:
    """Reads config and headers, not the data. dtype: 'source', 'float32' or 'bfloat16' (what the
    model keeps in float32 stays so). Raises `UserError` when the source is not complete, damaged,
    or not the model its config describes.
    """
    if not (src / component).is_dir():
        raise UserError(f"{src / component} is missing: the download is not complete")
    shards = Shards(src / component, STEMS[component])
    try:
        config = config_lib.load(
            model_dir.COMPONENTS[component][0], src / component / "config.json"
        )
        kept = DTYPES["float32" if dtype == "source" else dtype]
        like = flat_params.flatten(model_dir.abstract(component, config, dtype=kept)[1])
        table = key_table.entries(
            component,
            {k: v.shape for k, v in like.items()},
            getattr(config, "patch_size", None) or (1, 2, 2),
        )
        key_table.check_coverage(component, table, shards.shapes)
    except (config_lib.ConfigError, key_table.KeyTableError) as error:
        raise UserError(f"{src}: {error}") from None
    dtypes = {k: np.dtype(v.dtype) for k, v in like.items()}
    # every tensor in the type it is stored in; layers that differ meet in one that holds both
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

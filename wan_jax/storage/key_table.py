"""The table between Diffusers' state dicts and our parameter trees, used in both directions.

Our parameters are named after the state dict, so the table is a rule with a few exceptions:

* path `a/b_0/c` is key `a.b.0.c`: an underscore before a final number is a list index, except in
  names that themselves end in a number (`NATIVE`);
* leaves: `kernel`, `embedding` and `scale` become `weight`, the VAE's `scale` becomes `gamma`;
  `bias` and the `scale_shift_table`s keep their names;
* modules run by `lax.scan` (`STACKED`) hold all their layers on axis 0 and become one key a layer.

A key without an entry and an entry without its key are both errors.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

NATIVE = re.compile(r"(linear|wi)_\d+$")
STACKED = {
    "transformer": "blocks",
    "transformer_2": "blocks",
    "text_encoder": "encoder/block",
    "vae": None,
}
BLOCK = 256  # rows and columns of a matrix that are copied at a time
ALIASES = {"text_encoder": {"encoder.embed_tokens.weight": "shared.weight"}}


class KeyTableError(ValueError):
    """Tensors that do not fit the model: missing, unknown or of the wrong shape."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of the state dict and its position in our tree."""

    key: str  # name in the state dict
    path: str  # name in our tree, joined by '/'
    layer: int | None  # index on axis 0 of a stacked parameter
    shape: tuple[int, ...]  # shape in the state dict
    to_ours: Callable[[np.ndarray], np.ndarray]  # from the state dict's layout to ours
    to_theirs: Callable[[np.ndarray], np.ndarray]

    @property
    def same(self) -> bool:
        """Whether both sides have the same layout, so that rows of one are rows of the other."""
        return self.to_ours is _same


Layout = tuple[
    tuple[int, ...], Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray], np.ndarray]
]


def _same(value: np.ndarray) -> np.ndarray:
    return value


def _key(component: str, path: str, layer: int | None) -> str:
    """Return the state dict's key of a parameter, or of one layer of a stacked parameter."""
    parts = path.split("/")
    stacked = STACKED[component]
    if layer is not None and stacked is not None:
        parts[stacked.count("/")] += f".{layer}"
    *modules, leaf = parts
    if component == "vae" and leaf == "scale":
        leaf = "gamma"
    elif leaf in ("kernel", "embedding", "scale"):
        leaf = "weight"
    modules = [
        name if NATIVE.search(name) else re.sub(r"_(\d+)$", r".\1", name) for name in modules
    ]
    return ".".join([*modules, leaf])


def _layout(
    component: str, path: str, shape: tuple[int, ...], patch: tuple[int, int, int]
) -> Layout:
    """Return (shape in the state dict, conversion to our layout, conversion back).

    shape: of our parameter, without the layer axis. patch: (p_t, p_h, p_w) of the transformer.
    """
    leaf = path.split("/")[-1]
    if leaf == "kernel" and path.endswith("patch_embedding/kernel"):
        # The patch convolution is one matrix product here:
        # ours [(p_t p_h p_w C), D], theirs [D, C, p_t, p_h, p_w]
        width = shape[1]
        channels = shape[0] // (patch[0] * patch[1] * patch[2])
        return (
            (width, channels, *patch),
            lambda value: value.transpose(2, 3, 4, 1, 0).reshape(shape),
            lambda value: value.reshape(*patch, channels, width).transpose(4, 3, 0, 1, 2),
        )
    if leaf == "kernel" and component == "vae" and len(shape) == 2:
        # The attention's 1x1 convolutions: ours [in, out], theirs [out, in, 1, 1]
        return (
            (shape[1], shape[0], 1, 1),
            lambda value: value[:, :, 0, 0].T,
            lambda value: value.T[:, :, None, None],
        )
    if leaf == "kernel":
        # ours [..., in, out], theirs [out, in, ...]
        ndim = len(shape)
        return (
            (shape[-1], shape[-2], *shape[:-2]),
            lambda value: value.transpose(*range(2, ndim), 1, 0),
            lambda value: value.transpose(ndim - 1, ndim - 2, *range(ndim - 2)),
        )
    if leaf == "scale" and component == "vae":
        theirs = (*shape, 1, 1) if "attentions_" in path else (*shape, 1, 1, 1)
        return theirs, lambda value: value.reshape(shape), lambda value: value.reshape(theirs)
    return shape, _same, _same


def entries(
    component: str,
    shapes: Mapping[str, tuple[int, ...]],
    patch_size: tuple[int, int, int] = (1, 2, 2),
) -> list[Entry]:
    """Return the table of one component.

    component: 'transformer', 'transformer_2', 'vae' or 'text_encoder'. shapes: our parameters, from
    the path joined by '/' to the shape (stacked parameters with their layer axis).
    """
    stacked, table = STACKED[component], []
    for path, shape in shapes.items():
        layers: Sequence[int | None] = [None]
        if stacked and path.startswith(stacked + "/"):
            layers, shape = range(shape[0]), shape[1:]
        theirs, to_ours, to_theirs = _layout(component, path, tuple(shape), patch_size)
        table += [
            Entry(_key(component, path, layer), path, layer, theirs, to_ours, to_theirs)
            for layer in layers
        ]
    return table


def check_coverage(
    component: str, table: list[Entry], found: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise `KeyTableError` unless `found` (state-dict key to shape) agrees with the table."""
    aliases = ALIASES.get(component, {})
    wanted = {entry.key: entry.shape for entry in table}
    missing = [key for key in wanted if key not in found]
    unknown = [key for key in found if key not in wanted and aliases.get(key) not in wanted]
    wrong = [
        f"{key}: {tuple(found[key])}, the config asks for {shape}"
        for key, shape in wanted.items()
        if key in found and tuple(found[key]) != tuple(shape)
    ]
    problems = []
    for label, names in (("missing", missing), ("unknown", unknown), ("of the wrong shape", wrong)):
        if names:
            more = f"; and {len(names) - 5} more" if len(names) > 5 else ""
            problems.append(f"{len(names)} {label} ({'; '.join(names[:5])}{more})")
    if problems:
        raise KeyTableError(
            f"{component}: the tensors do not fit config.json: "
            + ", ".join(problems)
            + ". Is it a Wan text-to-video checkpoint in Diffusers layout, complete and unmixed?"
        )


def to_ours(
    component: str,
    tensors: Mapping[str, np.ndarray],
    shapes: Mapping[str, tuple[int, ...]],
    patch_size: tuple[int, int, int] = (1, 2, 2),
) -> dict[str, np.ndarray]:
    """Convert a whole state dict to our flat tree {path: array}, with layers stacked.

    Raises `KeyTableError` when a tensor is missing, unknown or of the wrong shape.
    """
    table = entries(component, shapes, patch_size)
    check_coverage(component, table, {k: v.shape for k, v in tensors.items()})
    out: dict[str, np.ndarray] = {}
    for entry in table:
        value = entry.to_ours(tensors[entry.key])
        if entry.layer is None:
            out[entry.path] = value
        else:
            if entry.path not in out:
                out[entry.path] = np.empty(shapes[entry.path], value.dtype)
            copy_in_blocks(value, out[entry.path][entry.layer])
    return out


def copy_in_blocks(source: np.ndarray, target: np.ndarray) -> None:
    """Copy an array into another one of its shape. A matrix is copied in blocks, which are read from the
    cache: four times faster where one of the two is transposed and large.
    """
    if source.ndim != 2:
        target[...] = source
        return
    for i in range(0, source.shape[0], BLOCK):
        for j in range(0, source.shape[1], BLOCK):
            target[i : i + BLOCK, j : j + BLOCK] = source[i : i + BLOCK, j : j + BLOCK]


def to_theirs(
    component: str, flat: Mapping[str, np.ndarray], patch_size: tuple[int, int, int] = (1, 2, 2)
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the (key, tensor) pairs of the state dict for our flat tree {path: array}."""
    for entry in entries(component, {k: v.shape for k, v in flat.items()}, patch_size):
        value = flat[entry.path] if entry.layer is None else flat[entry.path][entry.layer]
        yield entry.key, np.ascontiguousarray(entry.to_theirs(value))

"""One table between Diffusers' state dicts and our parameter trees, read in both directions.

Our parameters are named after the state dict, so the table is a rule with a few exceptions:

* path `a/b_0/c` is key `a.b.0.c`: an underscore before a final number is a list index, except in
  the names that end
  in a number by themselves (`NATIVE`);
* leaves: `kernel`, `embedding` and `scale` are `weight`, the VAE's `scale` is `gamma`, `bias` and
  the
  `scale_shift_table`s keep their names;
* modules run by `lax.scan` (`STACKED`) hold all their layers on axis 0 and become one key a layer.

A key that no entry produces, or an entry whose key is missing, is an error: coverage is 100 % both
ways.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping

import numpy as np

NATIVE = re.compile(r"(linear|wi)_\d+$")
STACKED = {
    "transformer": "blocks",
    "transformer_2": "blocks",
    "text_encoder": "encoder/block",
    "vae": None,
}
ALIASES = {"text_encoder": {"encoder.embed_tokens.weight": "shared.weight"}}


class KeyTableError(ValueError):
    """The tensors do not fit the model: missing, extra or mis-shaped."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of the state dict and its place in our tree."""

    key: str  # name in the state dict
    path: str  # name in our tree, joined by '/'
    layer: int | None  # index on axis 0 of a stacked parameter
    shape: tuple[int, ...]  # shape in the state dict
    to_ours: Callable[[np.ndarray], np.ndarray]
    to_theirs: Callable[[np.ndarray], np.ndarray]

    @property
    def same(self) -> bool:
        """Whether both sides have the same layout, so that rows of one are rows of the other."""
        return self.to_ours is _same


def _same(w: np.ndarray) -> np.ndarray:
    return w


def _key(component: str, path: str, layer: int | None) -> str:
    parts = path.split("/")
    stacked = STACKED[component]
    if layer is not None:
        n = len(stacked.split("/"))
        parts[n - 1] = f"{parts[n - 1]}.{layer}"
    *modules, leaf = parts
    if component == "vae" and leaf == "scale":
        leaf = "gamma"
    elif leaf in ("kernel", "embedding", "scale"):
        leaf = "weight"
    modules = [m if NATIVE.search(m) else re.sub(r"_(\d+)$", r".\1", m) for m in modules]
    return ".".join([*modules, leaf])


def _convert(component: str, path: str, shape: tuple[int, ...], patch: tuple[int, int, int] | None):
    """(shape in the state dict, to ours, to theirs) for one parameter of our shape `shape` (without
    the layer axis).
    """
    leaf = path.split("/")[-1]
    if leaf == "kernel" and path.endswith("patch_embedding/kernel"):
        # ours [(p_t p_h p_w C), D]: the patch convolution as one matrix product; theirs [D, C, p_t,
        # p_h, p_w]
        d, (pt, ph, pw) = shape[1], patch
        c = shape[0] // (pt * ph * pw)
        return (
            (d, c, pt, ph, pw),
            lambda w: w.transpose(2, 3, 4, 1, 0).reshape(shape),
            lambda w: w.reshape(pt, ph, pw, c, d).transpose(4, 3, 0, 1, 2),
        )
    if leaf == "kernel" and component == "vae" and len(shape) == 2:  # attention's 1x1 convolutions
        i, o = shape
        return (o, i, 1, 1), lambda w: w[:, :, 0, 0].T, lambda w: w.T[:, :, None, None]
    if leaf == "kernel":  # [..., in, out] <- [out, in, ...]
        n = len(shape)
        return (
            (shape[-1], shape[-2], *shape[:-2]),
            lambda w: w.transpose(*range(2, n), 1, 0),
            lambda w: w.transpose(n - 1, n - 2, *range(n - 2)),
        )
    if leaf == "scale" and component == "vae":
        theirs = (*shape, 1, 1) if "attentions_" in path else (*shape, 1, 1, 1)
        return theirs, lambda w: w.reshape(shape), lambda w: w.reshape(theirs)
    return shape, _same, _same


def entries(
    component: str,
    shapes: Mapping[str, tuple[int, ...]],
    patch_size: tuple[int, int, int] = (1, 2, 2),
) -> list[Entry]:
    """The table of one component.

    component: 'transformer', 'transformer_2', 'vae' or 'text_encoder'. shapes: our parameters, path
    joined by '/' to shape (stacked parameters with their layer axis).
    """
    stacked, table = STACKED[component], []
    for path, shape in shapes.items():
        layers: list[int | None] = [None]
        if stacked and path.startswith(stacked + "/"):
            layers, shape = list(range(shape[0])), shape[1:]
        theirs, to_ours, to_theirs = _convert(component, path, tuple(shape), patch_size)
        table += [
            Entry(_key(component, path, i), path, i, theirs, to_ours, to_theirs) for i in layers
        ]
    return table


def check_coverage(
    component: str, table: list[Entry], found: Mapping[str, tuple[int, ...]]
) -> None:
    """Raises `KeyTableError` unless `found` (state-dict key to shape) and the table agree exactly,
    both ways.
    """
    aliases = ALIASES.get(component, {})
    wanted = {entry.key: entry.shape for entry in table}
    missing = [k for k in wanted if k not in found]
    extra = [k for k in found if k not in wanted and aliases.get(k) not in wanted]
    wrong = [
        f"{k}: {tuple(found[k])}, the config asks for {s}"
        for k, s in wanted.items()
        if k in found and tuple(found[k]) != tuple(s)
    ]
    problems = []
    for label, names in (("missing", missing), ("unknown", extra), ("of the wrong shape", wrong)):
        if names:
            shown = "; ".join(names[:5]) + (
                f"; and {len(names) - 5} more" if len(names) > 5 else ""
            )
            problems.append(f"{len(names)} {label} ({shown})")
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
    """A whole state dict to our flat tree {path: array}; stacked parameters are stacked. Checks
    coverage first.
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
            out[entry.path][entry.layer] = value
    return out


def to_theirs(
    component: str, flat: Mapping[str, np.ndarray], patch_size: tuple[int, int, int] = (1, 2, 2)
) -> Iterator[tuple[str, np.ndarray]]:
    """Our flat tree {path: array} to (key, tensor) pairs of the state dict."""
    for entry in entries(component, {k: v.shape for k, v in flat.items()}, patch_size):
        value = flat[entry.path] if entry.layer is None else flat[entry.path][entry.layer]
        yield entry.key, np.ascontiguousarray(entry.to_theirs(value))

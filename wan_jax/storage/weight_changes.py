"""Changes of stored weights while they are read: base + change in float32, rounded once."""

import dataclasses
import math
from collections.abc import Callable, Mapping

import numpy as np

from wan_jax.distributed import multihost
from wan_jax.errors import UserError

Index = tuple[slice, ...]
# returns a slice of a change, fp32
Term = Callable[[Index], np.ndarray]
# {path of a parameter: {layer, None outside of blocks: what is added to it}}
Terms = Mapping[str, Mapping[int | None, list[Term]]]


def product(a: np.ndarray, b: np.ndarray, scale: float) -> Term:
    """Return the change scale * A B of a kernel [in, out]. a: [in, r]; b: [r, out]; fp32."""
    a = np.float32(scale) * a
    return lambda index: a[index[0]] @ b[:, index[1]]


def whole(value: np.ndarray, scale: float) -> Term:
    """Return the change scale * value of a parameter."""
    return lambda index: np.float32(scale) * value[index]


@dataclasses.dataclass
class Rounding:
    """How much of some changes rounding lost, as squared norms.

    The change of the rounded weights is compared with the change in float32.
    """

    changed: float = 0.0
    missed: float = 0.0

    def add(self, change: np.ndarray, kept: np.ndarray) -> None:
        """Count one change, fp32. kept: the difference of the rounded weights."""
        missed = change - kept
        self.changed += float(np.vdot(change, change))
        self.missed += float(np.vdot(missed, missed))

    @property
    def lost(self) -> float:
        """Relative norm of the part of the changes that rounding lost so far."""
        return math.sqrt(self.missed / self.changed) if self.changed else 0.0


class WeightChanges:
    """Changes of one transformer's parameters.

    Attributes:
        terms: what is added to each parameter.
        rounding: of all weights that were merged so far.
    """

    def __init__(self, terms: Terms):
        self.terms = terms
        self.rounding = Rounding()

    def merge(
        self, base: np.ndarray, path: str, layer: int | None, dtype, index: Index = ()
    ) -> np.ndarray:
        """Return a layer of a parameter, or a slice of it, with its changes, in `dtype`.

        base: as stored; its layer and slice are `layer` and `index` (empty: all of it). A parameter
        without changes is returned as it is stored.
        """
        terms = self.terms.get(path, {}).get(layer)
        if not terms:
            return base
        index = index or (slice(None),) * base.ndim
        base = base.astype(np.float32)
        merged = base + sum(term(index) for term in terms)
        result, change = merged.astype(dtype), merged - base
        kept = change
        if result.dtype != np.float32:
            kept = result.astype(np.float32) - base.astype(dtype).astype(np.float32)
        self.rounding.add(change, kept)
        return result

    def merge_slice(self, path: str, shape: tuple[int, ...], dtype, index: Index, read: Callable):
        """Return a slice of a parameter with its changes, in `dtype`, one layer after the other.

        shape: of the whole parameter, with its layers. read: slice -> the stored values in fp32.
        """
        if None in self.terms[path]:
            return self.merge(read(index), path, None, dtype, index)
        layers, *others = (range(*s.indices(n)) for s, n in zip(index, shape, strict=True))
        out = np.empty([len(layers), *map(len, others)], dtype)
        for i, layer in enumerate(layers):
            (base,) = read((slice(layer, layer + 1), *index[1:]))
            out[i] = self.merge(base, path, layer, dtype, index[1:])
        return out

    def report(self, component: str, names: str) -> None:
        """Print what was merged into a component, and how much of it rounding lost. Raises
        `UserError` where merged weights overflow.

        names: of what was merged.
        """
        if not math.isfinite(self.rounding.changed):
            raise UserError(
                f"{component}: merging {names} gives weights beyond float32: lower the scale"
            )
        if self.terms and multihost.first():
            count = sum(map(len, self.terms.values()))
            print(
                f"{component}: merged {names} into {count} tensors; rounding lost "
                f"{100 * min(1, self.rounding.lost):.2g} % of the change (relative norm)",
                flush=True,
            )

    def applied(self, flat: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return whole parameters {path: fp32} with their changes, in fp32."""
        result = {path: np.asarray(value) for path, value in flat.items()}
        for path in self.terms:
            value = result[path]
            index = (slice(None),) * value.ndim
            result[path] = self.merge_slice(path, value.shape, np.float32, index, value.__getitem__)
        return result

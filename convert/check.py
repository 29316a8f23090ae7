"""A converted component compared with its source, one tensor at a time."""

import numpy as np
from tqdm import tqdm

from convert.plan import Plan
from wan_jax.errors import UserError
from wan_jax.storage.model_dir import ModelDir


def differences(plan: Plan, model: ModelDir) -> list[str]:
    """One line for each array that is missing, unknown or of another shape or dtype, and for each
    tensor whose bytes are not those that a conversion would write. Raises `UserError` when the
    source is damaged.
    """
    try:
        store = model.arrays(plan.component)
    except UserError as error:
        return [str(error)]
    wanted = {name: _describe(shape, dtype) for name, (shape, dtype, _) in plan.arrays.items()}
    there = {name: _describe(shape, store.dtypes[name]) for name, shape in store.shapes.items()}
    found = [
        f"{store.path}: {name} is {there.get(name, 'missing')}, expected "
        f"{wanted.get(name, 'nothing')}"
        for name in sorted(wanted.keys() | there.keys())
        if wanted.get(name) != there.get(name)
    ]
    with tqdm(
        desc=plan.component, total=plan.size, unit="B", unit_scale=True, leave=False, disable=None
    ) as bar:
        for entry in plan.table:
            if wanted[entry.path] != there.get(entry.path):
                continue
            for row, value in plan.pieces(entry):
                bar.update(value.nbytes)
                stored = store.read(entry.path, entry.layer, slice(row, row + len(value)))
                if at := _first_difference(stored, value):
                    where, number = at
                    layer = "" if entry.layer is None else f"[{entry.layer}]"
                    found.append(
                        f"{store.path}: {entry.path}{layer} ({entry.key}): {number} values differ, "
                        f"the first is {stored[where]} and should be {value[where]}"
                    )
                    break
    return found


def _describe(shape: tuple[int, ...], dtype: np.dtype) -> str:
    return f"{dtype} {list(shape)}"


def _first_difference(a: np.ndarray, b: np.ndarray) -> tuple[tuple[int, ...], int] | None:
    """(index of the first value with other bits, how many there are), or None."""
    unsigned = f"u{a.dtype.itemsize}"
    other = a.reshape(-1).view(unsigned) != b.reshape(-1).view(unsigned)
    return (
        (tuple(map(int, np.unravel_index(int(other.argmax()), a.shape))), int(other.sum()))
        if other.any()
        else None
    )

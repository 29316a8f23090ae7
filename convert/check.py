"""Comparison of a converted component with its source, one tensor at a time."""

import numpy as np
from tqdm import tqdm

from convert.plan import Plan
from wan_jax.errors import UserError
from wan_jax.storage.model_dir import ModelDir


def differences(plan: Plan, model: ModelDir) -> list[str]:
    """Return one line for each array or tensor in which `model` differs from the plan.

    An array differs if it is missing, unknown, or of another shape or dtype; a tensor differs if
    its bytes are not those that a conversion would write. Raises `UserError` when the source is
    damaged.
    """
    try:
        store = model.arrays(plan.component)
    except UserError as error:
        return [str(error)]
    expected = {name: _describe(shape, dtype) for name, (shape, dtype, _) in plan.arrays.items()}
    stored = {name: _describe(shape, store.dtypes[name]) for name, shape in store.shapes.items()}
    lines = [
        f"{store.path}: {name} is {stored.get(name, 'missing')}, expected "
        f"{expected.get(name, 'nothing')}"
        for name in sorted(expected.keys() | stored.keys())
        if expected.get(name) != stored.get(name)
    ]
    with tqdm(
        desc=plan.component, total=plan.size, unit="B", unit_scale=True, leave=False, disable=None
    ) as progress:
        for entry in plan.table:
            if expected[entry.path] != stored.get(entry.path):
                continue
            for row, value in plan.pieces(entry):
                progress.update(value.nbytes)
                read = store.read(entry.path, entry.layer, slice(row, row + len(value)))
                if difference := _first_difference(read, value):
                    index, count = difference
                    layer = "" if entry.layer is None else f"[{entry.layer}]"
                    lines.append(
                        f"{store.path}: {entry.path}{layer} ({entry.key}): {count} values differ, "
                        f"the first is {read[index]} and should be {value[index]}"
                    )
                    break
    return lines


def _describe(shape: tuple[int, ...], dtype: np.dtype) -> str:
    return f"{dtype} {list(shape)}"


def _first_difference(a: np.ndarray, b: np.ndarray) -> tuple[tuple[int, ...], int] | None:
    """Return (index of the first value whose bits differ, number of such values), or None."""
    unsigned = f"u{a.dtype.itemsize}"
    differs = a.reshape(-1).view(unsigned) != b.reshape(-1).view(unsigned)
    if not differs.any():
        return None
    index = np.unravel_index(int(differs.argmax()), a.shape)
    return tuple(map(int, index)), int(differs.sum())

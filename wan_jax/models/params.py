"""Parameter trees as flat dicts {'blocks/attn1/to_q/kernel': array}, the form that files and the
key table use.
"""

from collections.abc import Mapping

import jax
from flax import nnx

SEPARATOR = "/"


def flatten(state: nnx.State) -> dict[str, jax.Array]:
    """An `nnx.State` (or a module's) to {path: array}; abstract states give
    `jax.ShapeDtypeStruct`s.
    """
    return {
        SEPARATOR.join(map(str, path)): leaf.get_value() if hasattr(leaf, "get_value") else leaf
        for path, leaf in nnx.to_flat_state(state)
    }


def unflatten(like: nnx.State, flat: Mapping[str, jax.Array]) -> nnx.State:
    """{path: array} to a state of the structure of `like`. Raises KeyError on a path that is
    missing.
    """
    paths, leaves = zip(*[(p, leaf) for p, leaf in nnx.to_flat_state(like)])
    values = [
        leaf.replace(flat[SEPARATOR.join(map(str, path))]) for path, leaf in zip(paths, leaves)
    ]
    return nnx.from_flat_state(list(zip(paths, values)))

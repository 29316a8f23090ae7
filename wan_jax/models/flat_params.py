"""Parameter trees as flat dicts {'blocks/attn1/to_q/kernel': array}: the form of the files on disk
and of `wan_jax.storage.key_table`.
"""

from collections.abc import Mapping

import jax
from flax import nnx

SEPARATOR = "/"


def flatten(state: nnx.State) -> dict[str, jax.Array]:
    """Return the arrays of a state by path; an abstract state gives `jax.ShapeDtypeStruct`s."""
    return {
        SEPARATOR.join(map(str, path)): leaf.get_value() if hasattr(leaf, "get_value") else leaf
        for path, leaf in nnx.to_flat_state(state)
    }


def unflatten(like: nnx.State, flat: Mapping[str, jax.Array]) -> nnx.State:
    """Return a state with the structure of `like` and the arrays of `flat`, by path.

    Raises KeyError when `flat` lacks a path of `like`.
    """
    entries = [
        (path, leaf.replace(flat[SEPARATOR.join(map(str, path))]))
        for path, leaf in nnx.to_flat_state(like)
    ]
    return nnx.from_flat_state(entries)

"""Abstract arrays: the shape, dtype and sharding of an array, to trace and compile functions with."""

from typing import Any

import jax


def array(shape: tuple[int, ...], dtype, **options) -> Any:
    """Return a `jax.ShapeDtypeStruct`. options: its `sharding` and `weak_type`.

    The type is Any because the result takes the place of a `jax.Array` in dataclasses of arrays.
    """
    return jax.ShapeDtypeStruct(shape, dtype, **options)


def arrays(tree: Any, sharding: jax.sharding.Sharding) -> Any:
    """Return the abstract arrays of a tree of arrays, all with the given sharding."""
    return jax.tree.map(lambda x: array(x.shape, x.dtype, sharding=sharding), tree)

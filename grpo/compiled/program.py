"""A jitted function with abstract arguments, to lower and compile it with."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from grpo.learning import abstract


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function with abstract arguments.

    Attributes:
        name: for the log.
        jitted: the function.
        args: its arguments, abstract up to static ones.
        resident: number of the first arguments that are on the devices throughout training.
        extra: abstract trees of further arrays that are on the devices while it runs, but not
            throughout training.
    """

    name: str
    jitted: Any  # jax.stages.Wrapped
    args: tuple
    resident: int = 0
    extra: tuple = ()


def identity(program: Program) -> tuple:
    """Return a value that is equal for `Program`s that share one compilation: (function, structure,
    shapes and dtypes).
    """
    leaves, treedef = jax.tree.flatten(program.args)
    return program.jitted, treedef, tuple((x.shape, x.dtype) for x in leaves)


def shared(programs: Iterable[Program]) -> list[Program]:
    """Return each program once. One that several experts share is named without the expert."""
    distinct = {}
    for program in programs:
        key = identity(program)
        if key in distinct:
            program = dataclasses.replace(program, name=program.name.partition(", ")[0])
        distinct[key] = program
    return list(distinct.values())


def integer() -> Any:
    """Return the abstract array of a Python int."""
    return abstract.array((), jnp.int32, weak_type=True)


def number() -> Any:
    """Return the abstract array of a Python float."""
    return abstract.array((), jnp.float32, weak_type=True)

"""How the fused kernels are called: over videos and blocks of their tokens, on each device's videos."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.custom_partitioning import custom_partitioning
from jax.experimental.pallas import triton as plt
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P


@dataclasses.dataclass(frozen=True)
class Tile:
    """The rows that a program computes, and its warps."""

    rows: int
    warps: int


@dataclasses.dataclass(frozen=True)
class Tiles:
    """The tilings of the kernels. Products of Triton need at least 16 rows."""

    heads: Tile = Tile(16, 8)
    heads_gradient: Tile = Tile(16, 8)
    norm: Tile = Tile(16, 8)
    gelu: Tile = Tile(2, 8)
    gelu_gradient: Tile = Tile(1, 8)


TILES = Tiles()


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel and how it is called.

    Attributes:
        function: takes refs of the inputs, then of the outputs, each of one video, and the keyword
            `rows`, a slice.
        name: its name in profiles.
        axes: a letter for each axis of inputs and outputs, as 'bsp bd -> bsd'.
    """

    function: Callable
    name: str
    axes: str


def call(kernel: Kernel, tile: Tile, inputs: Sequence[jax.Array], sizes: dict, dtypes) -> tuple:
    """Run a kernel over (B, blocks of S), on each device's share of B. The last block starts earlier
    where S is no multiple, so that some rows are computed twice.

    sizes: of letters that no input has. dtypes: of the outputs.
    """
    arguments, results = (side.split() for side in kernel.axes.split("->"))
    tokens = inputs[0].shape[1]
    if tokens < tile.rows:
        inputs = [
            jnp.pad(x, [(0, tile.rows - tokens if axis == "s" else 0) for axis in names])
            for names, x in zip(arguments, inputs)
        ]
        return tuple(y[:, :tokens] for y in call(kernel, tile, inputs, sizes, dtypes))

    def run(*arrays):
        size = dict(sizes)
        for names, x in zip(arguments, arrays):
            size |= dict(zip(names, x.shape))
        count = tile.rows

        def spec(names):
            block = [None if axis == "b" else size[axis] for axis in names]
            return pl.BlockSpec(block, lambda b, _: tuple(b if a == "b" else 0 for a in names))

        def program(*refs):
            start = jnp.minimum(pl.program_id(1) * count, size["s"] - count)
            kernel.function(*refs, rows=pl.ds(start, count))

        return pl.pallas_call(
            program,
            grid=(size["b"], pl.cdiv(size["s"], count)),
            in_specs=[spec(names) for names in arguments],
            out_specs=tuple(spec(names) for names in results),
            out_shape=tuple(
                jax.ShapeDtypeStruct([size[axis] for axis in names], dtype)
                for names, dtype in zip(results, dtypes)
            ),
            compiler_params=plt.CompilerParams(num_warps=tile.warps, num_stages=1),
            name=kernel.name,
        )(*arrays)

    def partition(mesh, argument_shapes, result_shapes):
        # videos are split as those of the first input, everything else is replicated
        videos = (*argument_shapes[0].sharding.spec, None)[0]

        def shardings(side):
            return tuple(
                NamedSharding(mesh, P(*(videos if axis == "b" else None for axis in names)))
                for names in side
            )

        return mesh, run, shardings(results), shardings(arguments)

    partitioned = custom_partitioning(run)
    rule = " -> ".join(
        ", ".join(" ".join(names) for names in side) for side in (arguments, results)
    )
    partitioned.def_partition(partition, sharding_rule=rule)
    return partitioned(*inputs)

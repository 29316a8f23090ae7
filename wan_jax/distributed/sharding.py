"""How the transformer runs on devices that share its weights (`fsdp`) or the tokens of a video
(`context`).

The whole forward runs inside one `jax.shard_map`: every device computes on its own videos and rows
of tokens, with one block's weights at a time, kernels see local arrays, and what devices send each
other is written here, nothing else:

- a block's weights: all-gathered over `fsdp` inside the scan over the blocks, so that one block's
  stand whole at a
  time; backward they are gathered again, and their gradients reduce-scattered, which is the
  gather's transpose;
- the tokens: each device of `context` takes ceil(S / devices) rows of the S, the last of them zeros
  where S is no
  multiple. Everything but self-attention works on rows. Self-attention changes rows for heads and
  back by all-to-all (Jacobs et al. 2023, "DeepSpeed Ulysses", arXiv 2309.14509), so that a device
  attends with all rows and N / devices heads; where `context` does not divide N, keys and values
  are gathered instead, and a device attends with its own queries. The zeros stand last, so they are
  cut off before the kernel and no mask is needed;
- at the end the rows, gathered: a velocity lies as its latents do, split by videos alone.

Left to XLA's partitioner, gradients of split weights were all-reduced whole, and activations moved
in place of weights where it lost track of what is split how.

Shapes: B videos, S tokens, s rows of a device, N heads.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from wan_jax.distributed.mesh import BATCH, param_spec
from wan_jax.models import params as P
from wan_jax.models.attention import attention

BLOCKS = "blocks" + P.SEPARATOR


@dataclasses.dataclass(frozen=True)
class Layout:
    """Runs a model's forward on `mesh`; a static attribute of the model."""

    mesh: Mesh

    def run(
        self,
        model: nnx.Module,
        latents: jax.Array,
        timesteps: jax.Array,
        text: jax.Array,
        text_padding: int,
    ) -> jax.Array:
        """`model.forward`, from and to global arrays: parameters as `mesh.param_shardings` lays
        them, the others split over data x fsdp by their first axis. B must be a multiple of data x
        fsdp.
        """
        graphdef, state = nnx.split(model)
        specs = jax.tree.map(self.spec, state)
        early = Gather(
            tuple(
                (path, axis)
                for path, axis in split_axes(state, self.mesh)
                if not path.startswith(BLOCKS) or axis == 0
            )
        )

        def local(state, latents, timesteps, text):
            return nnx.merge(graphdef, early.state(state)).forward(
                latents, timesteps, text, text_padding
            )

        # check_vma=False: gradients of what is whole on several devices are summed over them,
        # kernels unchanged
        return jax.shard_map(
            local,
            mesh=self.mesh,
            in_specs=(specs, BATCH, BATCH, BATCH),
            out_specs=BATCH,
            check_vma=False,
        )(state, latents, timesteps, text)

    def spec(self, x) -> PartitionSpec:
        """How a parameter lies, by `mesh.param_spec`. Axes of one device are named too, where they
        split nothing: over an axis that is not named the gradient is summed, and XLA keeps a sum
        over one device.
        """
        ones = tuple(axis for axis, size in self.mesh.shape.items() if size == 1)
        first, *rest = tuple(param_spec(x.shape, self.mesh.shape["fsdp"])) or (None,)
        return PartitionSpec(((first,) if first else ()) + ones or None, *rest)

    def own_tokens(self, x: jax.Array, axis: int) -> jax.Array:
        """This device's rows of an array that has all S along `axis`, filled up with zeros."""
        devices = self.mesh.shape["context"]
        rows = -(-x.shape[axis] // devices)
        widths = [(0, rows * devices - n if i == axis else 0) for i, n in enumerate(x.shape)]
        return jax.lax.dynamic_slice_in_dim(
            jnp.pad(x, widths), jax.lax.axis_index("context") * rows, rows, axis
        )

    def all_tokens(self, x: jax.Array, tokens: int) -> jax.Array:
        """[B,s,...] of every device to [B,S,...]."""
        return jax.lax.all_gather(x, "context", axis=1, tiled=True)[:, :tokens]


@dataclasses.dataclass(frozen=True)
class Gather:
    """What of a module's parameters is split over `fsdp`, by path and axis; a static attribute of
    the blocks.
    """

    axes: tuple[tuple[str, int], ...]
    # gather again for the backward pass: where nothing is recomputed, whole weights would be kept
    again: bool = False

    def state(self, state: nnx.State) -> nnx.State:
        """The state with those parameters whole."""
        flat = P.flatten(state)
        return P.unflatten(
            state,
            flat
            | {
                path: jax.lax.all_gather(flat[path], "fsdp", axis=axis, tiled=True)
                for path, axis in self.axes
            },
        )

    def module(self, module: nnx.Module) -> nnx.Module:
        """The module with those parameters whole."""
        graphdef, state = nnx.split(module)
        whole = nnx.merge(graphdef, self.state(state))
        whole.gather = None
        return whole


def attach(model: nnx.Module, mesh: Mesh | None) -> nnx.Module:
    """Makes `model`, adapters and all, run on `mesh` where that shares weights or tokens; in place,
    and returns it.

    Where only videos are split the model stays as it is: XLA's partitioner then sends nothing but
    the gradient's sums.
    """
    if mesh is None or mesh.shape["fsdp"] == mesh.shape["context"] == 1:
        return model
    model.layout = Layout(mesh)
    axes = tuple(
        (path.removeprefix(BLOCKS), axis - 1)
        for path, axis in split_axes(nnx.state(model), mesh)
        # of one block: the scan takes the first axis
        if path.startswith(BLOCKS) and axis > 0
    )
    if axes:
        model.blocks.gather = Gather(axes, again=model.remat == "none")
    return model


def split_axes(state: nnx.State, mesh: Mesh) -> list[tuple[str, int]]:
    """(path, axis) of every parameter that is split, from the global shapes."""
    specs = {path: param_spec(x.shape, mesh.shape["fsdp"]) for path, x in P.flatten(state).items()}
    return [(path, spec.index("fsdp")) for path, spec in specs.items() if "fsdp" in spec]


def saved_but_gathers(primitive, *_, **__) -> bool:
    """Policy of `jax.checkpoint`: keeps what it would keep without it, but no gathered weights, nor
    several beside each other (`layers.joined`).
    """
    return primitive.name not in ("all_gather", "concatenate")


def self_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *, backend: str, tokens: int | None
) -> jax.Array:
    """`attention` among all S tokens of each video, of which this device has the rows
    [B,s,N,head_dim] -> the same.

    tokens: S, where they are split over `context`; None: they are not.
    """
    if tokens is None:
        return attention(q, k, v, backend=backend)
    if q.shape[2] % jax.lax.axis_size("context"):
        k, v = (jax.lax.all_gather(x, "context", axis=1, tiled=True)[:, :tokens] for x in (k, v))
        return attention(q, k, v, backend=backend)
    padded = q.shape[1] * jax.lax.axis_size("context")
    # [B,S,N/devices,..]
    q, k, v = (jax.lax.all_to_all(x, "context", 2, 1, tiled=True)[:, :tokens] for x in (q, k, v))
    out = attention(q, k, v, backend=backend)
    out = jnp.pad(out, ((0, 0), (0, padded - tokens), (0, 0), (0, 0)))
    return jax.lax.all_to_all(out, "context", 1, 2, tiled=True)

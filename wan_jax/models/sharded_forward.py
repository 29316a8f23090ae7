"""The forward pass of the transformer on devices that share its weights (`fsdp`) or the tokens of a
video (`context`).

The whole forward pass runs inside one `jax.shard_map`. Every device computes on its own videos and
token rows, with the weights of one block at a time, and kernels see local arrays. All communication
is written in this module:

- Weights of a block: all-gathered over `fsdp` inside the scan over the blocks, so that one block at
  a time is whole. The backward pass gathers them again and reduce-scatters their gradients, which
  is the transpose of the gather.
- Tokens: each device of a `context` group has ceil(S / devices) rows of the S; the last rows are
  zeros if S is no multiple. All layers but self-attention work on rows. Self-attention exchanges
  rows for heads and back by all-to-all (Jacobs et al. 2023, "DeepSpeed Ulysses", arXiv 2309.14509),
  so that a device attends with all rows and N / devices heads. If `context` does not divide N,
  keys and values are gathered instead, and a device attends with its own queries. The zero rows
  are last, so they are cut off before the kernel and no mask is needed.
- Output: the rows are gathered at the end, so the velocity is sharded as the latents are, by videos
  only.

Under XLA's automatic partitioner, gradients of sharded weights were all-reduced whole, and it moved
activations instead of weights where it lost track of the shardings.

Shapes: B videos, S tokens, s token rows of a device, N heads.
"""

import dataclasses
from typing import Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from wan_jax.distributed.sharding import BATCH, param_spec
from wan_jax.models import flat_params
from wan_jax.models.attention import attention

BLOCKS = "blocks" + flat_params.SEPARATOR


class ShardedBlocks(Protocol):
    """Blocks that gather their parameters before they run."""

    gather: "Gather | None"


class ShardedModel(Protocol):
    """A model whose forward pass can run by `Layout.run`."""

    layout: "Layout | None"
    remat: str

    @property
    def blocks(self) -> ShardedBlocks:
        """The blocks that the scan runs over."""
        ...

    def forward(
        self, latents: jax.Array, timesteps: jax.Array, text: jax.Array, text_padding: int, /
    ) -> jax.Array:
        """Compute the velocity from the arrays of one device."""
        ...


Model = TypeVar("Model", bound=ShardedModel)
Blocks = TypeVar("Blocks", bound=ShardedBlocks)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Runs the forward pass of a model on `mesh`; a static attribute of the model."""

    mesh: Mesh

    def run(
        self,
        model: ShardedModel,
        latents: jax.Array,
        timesteps: jax.Array,
        text: jax.Array,
        text_padding: int,
    ) -> jax.Array:
        """Compute `model.forward` from and to global arrays.

        Parameters are sharded by `sharding.param_shardings`, the other arrays over data x fsdp by
        their first axis. B must be a multiple of data x fsdp.
        """
        graphdef, state = nnx.split(model)
        specs = jax.tree.map(self.spec, state)
        # Gathered here: what is outside the blocks, and what is split over the layers.
        outside_scan = Gather(
            tuple(
                (path, axis)
                for path, axis in split_axes(state, self.mesh)
                if not path.startswith(BLOCKS) or axis == 0
            )
        )

        def local(state, latents, timesteps, text):
            return nnx.merge(graphdef, outside_scan.state(state)).forward(
                latents, timesteps, text, text_padding
            )

        # check_vma=False: the gradients of replicated parameters are summed over the devices, and
        # kernels need no change.
        return jax.shard_map(
            local,
            mesh=self.mesh,
            in_specs=(specs, BATCH, BATCH, BATCH),
            out_specs=BATCH,
            check_vma=False,
        )(state, latents, timesteps, text)

    def spec(self, x) -> PartitionSpec:
        """Return the sharding of a parameter by `param_spec`, which also names the mesh axes of
        size 1.

        They split nothing, but over an axis that is not named the gradient is summed, and XLA does
        not remove a sum over one device.
        """
        single = tuple(axis for axis, size in self.mesh.shape.items() if size == 1)
        first, *rest = tuple(param_spec(x.shape, self.mesh.shape["fsdp"])) or (None,)
        return PartitionSpec(((first,) if first else ()) + single or None, *rest)

    def own_tokens(self, x: jax.Array | np.ndarray, axis: int) -> jax.Array:
        """Return this device's rows of an array with S tokens along `axis`, padded with zeros."""
        devices = self.mesh.shape["context"]
        rows = -(-x.shape[axis] // devices)
        widths = [(0, rows * devices - n if i == axis else 0) for i, n in enumerate(x.shape)]
        return jax.lax.dynamic_slice_in_dim(
            jnp.pad(x, widths), jax.lax.axis_index("context") * rows, rows, axis
        )

    def all_tokens(self, x: jax.Array, tokens: int) -> jax.Array:
        """Gather [B,s,...] of the devices of a context group to [B,S,...] on each of them."""
        return jax.lax.all_gather(x, "context", axis=1, tiled=True)[:, :tokens]


@dataclasses.dataclass(frozen=True)
class Gather:
    """The parameters of a module that are split over `fsdp`; a static attribute of the blocks.

    Attributes:
        axes: path and axis of each of these parameters.
        again: whether they are gathered again in the backward pass. Needed where activations are
            not recomputed: otherwise the gathered weights would be saved for it.
    """

    axes: tuple[tuple[str, int], ...]
    again: bool = False

    def state(self, state: nnx.State) -> nnx.State:
        """Return the state with these parameters gathered."""
        flat = flat_params.flatten(state)
        gathered = {
            path: jax.lax.all_gather(flat[path], "fsdp", axis=axis, tiled=True)
            for path, axis in self.axes
        }
        return flat_params.unflatten(state, flat | gathered)

    def module(self, module: Blocks) -> Blocks:
        """Return the module with these parameters gathered."""
        graphdef, state = nnx.split(module)
        whole = nnx.merge(graphdef, self.state(state))
        whole.gather = None
        return whole


def attach(model: Model, mesh: Mesh | None) -> Model:
    """Make `model`, including its adapters, run on `mesh` if that shares weights or tokens. Changes
    it in place and returns it.

    If only videos are split, the model is not changed: XLA's partitioner then communicates only the
    sums of the gradients.
    """
    if mesh is None or mesh.shape["fsdp"] == mesh.shape["context"] == 1:
        return model
    model.layout = Layout(mesh)
    axes = tuple(
        (path.removeprefix(BLOCKS), axis - 1)
        for path, axis in split_axes(nnx.state(model), mesh)
        # axes of one block: the scan consumes the first axis
        if path.startswith(BLOCKS) and axis > 0
    )
    if axes:
        model.blocks.gather = Gather(axes, again=model.remat == "none")
    return model


def split_axes(state: nnx.State, mesh: Mesh) -> list[tuple[str, int]]:
    """Return (path, axis) of every parameter that is split over `fsdp`, from global shapes."""
    specs = {
        path: param_spec(x.shape, mesh.shape["fsdp"])
        for path, x in flat_params.flatten(state).items()
    }
    return [(path, spec.index("fsdp")) for path, spec in specs.items() if "fsdp" in spec]


def saved_but_gathers(primitive, *_, **__) -> bool:
    """A policy for `jax.checkpoint`: save everything except gathered weights, and except
    concatenations of them (`layers.fused_dense`).
    """
    return primitive.name not in ("all_gather", "concatenate")


def self_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *, backend: str, tokens: int | None
) -> jax.Array:
    """Compute `attention` among all S tokens of each video, from and to the token rows of this
    device [B,s,N,head_dim].

    tokens: S if the tokens are split over `context`, None if they are not.
    """
    if tokens is None:
        return attention(q, k, v, backend=backend)
    # The heads do not divide: all keys and values, own queries.
    if q.shape[2] % jax.lax.axis_size("context"):
        k, v = (jax.lax.all_gather(x, "context", axis=1, tiled=True)[:, :tokens] for x in (k, v))
        return attention(q, k, v, backend=backend)
    # Exchange rows for heads [B,S,N/devices,head_dim], attend, exchange back.
    padded = q.shape[1] * jax.lax.axis_size("context")
    q, k, v = (jax.lax.all_to_all(x, "context", 2, 1, tiled=True)[:, :tokens] for x in (q, k, v))
    out = attention(q, k, v, backend=backend)
    out = jnp.pad(out, ((0, 0), (0, padded - tokens), (0, 0), (0, 0)))
    return jax.lax.all_to_all(out, "context", 1, 2, tiled=True)

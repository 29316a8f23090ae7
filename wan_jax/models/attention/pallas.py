"""Fused attention as Pallas-Triton kernels, forward and backward: logits never leave the chip.

Online softmax over blocks of keys, and a backward pass that recomputes the probabilities from the
saved log-sum-exp (Dao 2023, "FlashAttention-2", algorithms 1 and 2). Exponentials are powers of
two, so logits, bias and log-sum-exp have a factor log2(e) inside the kernels.

Shapes: B videos, Sq and Sk tokens padded to whole blocks, N heads, head_dim.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.custom_partitioning import custom_partitioning
from jax.experimental.pallas import triton as plt
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Float32

from wan_jax.models.attention.chunked import SAVED

LOG2E = math.log2(math.e)
LDS_BYTES = 65536  # local data share of one gfx942 workgroup


@dataclasses.dataclass(frozen=True)
class Tile:
    """The tiling of one kernel. A program computes `own` rows of the output, and streams the other
    side `step` rows at a time.
    """

    own: int
    step: int
    warps: int = 4

    def lds_bytes(self, head_dim: int, itemsize: int = 2) -> int:
        """Return an upper bound of the local memory of a workgroup: the largest single operand,
        because loops without pipelining stage one at a time.

        XLA's compiler for gfx942 requested this or less in all 42 tilings of 32 to 128 rows that
        were tried.
        """
        return itemsize * max(self.own * head_dim, self.step * head_dim, self.own * self.step)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The tilings of the three kernels.

    They compile for gfx942 without spilling registers at head_dim 16 to 128, with at most 266 of
    the 512 registers of a thread; at head_dim 128, 128 by 64 rows with 8 warps would spill 117 of
    them in `keys`.
    """

    forward: Tile = Tile(128, 64)  # own queries, stream keys
    keys: Tile = Tile(64, 32)  # dK and dV: own keys, stream queries
    queries: Tile = Tile(64, 32)  # dQ: own queries, stream keys


def pallas_attention(
    q: Float[Array, "B Sq N head_dim"],
    k: Float[Array, "B Sk N head_dim"],
    v: Float[Array, "B Sk N head_dim"],
    key_bias: Float32[Array, " Sk"] | None = None,
    *,
    blocks: Blocks = Blocks(),
    interpret: bool = False,
) -> Float[Array, "B Sq N head_dim"]:
    """Return softmax(q k^T / sqrt(head_dim) + key_bias) v by the fused kernels.

    head_dim must be a power of two; key_bias is not differentiated. Logits, softmax and
    accumulation are fp32, matrix products are in the dtype of q. Lengths that do not fill the
    blocks are padded: keys with a bias of -inf, queries with rows that are cut off. On several
    devices each computes its own videos and heads. interpret: compute without a GPU, for tests.
    Raises ValueError when the blocks need more local memory than an MI300X has.
    """
    for field in dataclasses.fields(blocks):
        tile = getattr(blocks, field.name)
        need = tile.lds_bytes(q.shape[-1], q.dtype.itemsize)
        if need > LDS_BYTES:
            raise ValueError(
                f"attention='pallas': {field.name}={tile} needs {need} bytes of local memory at "
                f"head_dim {q.shape[-1]}, gfx942 has {LDS_BYTES}; choose fewer rows"
            )
    sq, sk = q.shape[1], k.shape[1]
    pad_q = -sq % math.lcm(blocks.forward.own, blocks.queries.own, blocks.keys.step)
    pad_k = -sk % math.lcm(blocks.forward.step, blocks.queries.step, blocks.keys.own)
    if key_bias is None and pad_k:
        key_bias = jnp.zeros(sk, jnp.float32)
    if key_bias is not None:
        key_bias = jnp.pad(key_bias * LOG2E, (0, pad_k), constant_values=-jnp.inf)
    q = jnp.pad(q, ((0, 0), (0, pad_q), (0, 0), (0, 0)))
    k, v = (jnp.pad(x, ((0, 0), (0, pad_k), (0, 0), (0, 0))) for x in (k, v))
    return cast(Array, _attend(blocks, interpret, q, k, v, key_bias))[:, :sq]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(blocks, interpret, q, k, v, key_bias):
    return _forward(blocks, interpret, q, k, v, key_bias)[0]


def _dot(a, b, contract_a: int = 1, contract_b: int = 0):  # fp32 accumulation
    return jax.lax.dot_general(
        a, b, (((contract_a,), (contract_b,)), ((), ())), preferred_element_type=jnp.float32
    )


def _rows(i, size: int):
    """Return the slice of block i."""
    return pl.ds(i * size, size)


# ---- kernels: every ref is one head of one video -------------------------------------------------
def _forward_kernel(q_ref, k_ref, v_ref, *refs, step: int, scale: float):
    """The output of `own` queries.

    refs: optional key_bias [Sk]; out [own, head_dim], log2-sum-exp2 [own].
    """
    bias_ref, (out_ref, lse_ref) = _optional(refs, 2)
    q = q_ref[...]  # [own, head_dim]

    def body(i, carry):
        out, total, largest = carry
        logits = _dot(q, k_ref[_rows(i, step), :], 1, 1) * scale  # [own, step]
        if bias_ref is not None:
            logits = logits + bias_ref[_rows(i, step)][None, :]
        new = jnp.maximum(largest, logits.max(1))
        shrink = jnp.exp2(largest - new)
        weights = jnp.exp2(logits - new[:, None])
        v = v_ref[_rows(i, step), :]
        out = out * shrink[:, None] + _dot(weights.astype(v.dtype), v)
        return out, total * shrink + weights.sum(1), new

    start = (
        jnp.zeros(q.shape, jnp.float32),
        jnp.zeros(len(q), jnp.float32),
        jnp.full(len(q), -jnp.inf, jnp.float32),
    )
    out, total, largest = jax.lax.fori_loop(0, k_ref.shape[0] // step, body, start)
    out_ref[...] = (out / total[:, None]).astype(out_ref.dtype)
    lse_ref[...] = largest + jnp.log2(total)


def _keys_kernel(q_ref, k_ref, v_ref, do_ref, lse_ref, dots_ref, *refs, step: int, scale: float):
    """dK and dV of `own` keys, from the transposed probabilities, so that no product needs a
    transposed operand.
    """
    bias_ref, (dk_ref, dv_ref) = _optional(refs, 2)
    k, v = k_ref[...], v_ref[...]  # [own, head_dim]
    bias = 0.0 if bias_ref is None else bias_ref[...][:, None]

    def body(i, carry):
        dk, dv = carry
        rows = _rows(i, step)
        q, do = q_ref[rows, :], do_ref[rows, :]  # [step, head_dim]
        # P^T [own, step]
        weights = jnp.exp2(_dot(k, q, 1, 1) * scale + bias - lse_ref[rows][None, :])
        dv = dv + _dot(weights.astype(do.dtype), do)
        ds = weights * (_dot(v, do, 1, 1) - dots_ref[rows][None, :])  # dS^T
        return dk + _dot(ds.astype(q.dtype), q), dv

    zeros = jnp.zeros(k.shape, jnp.float32)
    dk, dv = jax.lax.fori_loop(0, q_ref.shape[0] // step, body, (zeros, zeros))
    dk_ref[...] = (dk * (scale / LOG2E)).astype(dk_ref.dtype)
    dv_ref[...] = dv.astype(dv_ref.dtype)


def _queries_kernel(q_ref, k_ref, v_ref, do_ref, lse_ref, dots_ref, *refs, step: int, scale: float):
    """dQ of `own` queries."""
    bias_ref, (dq_ref,) = _optional(refs, 1)
    q, do = q_ref[...], do_ref[...]  # [own, head_dim]
    lse, dots = lse_ref[...][:, None], dots_ref[...][:, None]

    def body(i, dq):
        rows = _rows(i, step)
        k = k_ref[rows, :]
        logits = _dot(q, k, 1, 1) * scale  # [own, step]
        if bias_ref is not None:
            logits = logits + bias_ref[rows][None, :]
        ds = jnp.exp2(logits - lse) * (_dot(do, v_ref[rows, :], 1, 1) - dots)
        return dq + _dot(ds.astype(k.dtype), k)

    dq = jax.lax.fori_loop(0, k_ref.shape[0] // step, body, jnp.zeros(q.shape, jnp.float32))
    dq_ref[...] = (dq * (scale / LOG2E)).astype(dq_ref.dtype)


def _optional(refs, outputs: int):
    """Split refs into the optional key_bias and the outputs."""
    return (refs[0] if len(refs) > outputs else None), refs[-outputs:]


# ---- calls ---------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel and how it is called.

    Attributes:
        function: the kernel.
        name: its name in profiles.
        own: 'q' or 'k', the axis that is split over programs; each program sees the whole of the
            other one.
        axes: axes of inputs and outputs, as 'bqnh bknh -> bqnh'.
    """

    function: Callable
    name: str
    own: str
    axes: str


FORWARD = Kernel(_forward_kernel, "attention", "q", "bqnh bknh bknh -> bqnh bnq")
BACKWARD_KEYS = Kernel(
    _keys_kernel, "attention_dkv", "k", "bqnh bknh bknh bqnh bnq bnq -> bknh bknh"
)
BACKWARD_QUERIES = Kernel(
    _queries_kernel, "attention_dq", "q", "bqnh bknh bknh bqnh bnq bnq -> bqnh"
)


def _call(kernel: Kernel, tile: Tile, interpret: bool, inputs, key_bias, dtypes) -> tuple:
    """Run a kernel over (B, N, blocks of the axis it owns), on each device's share of B and N.

    key_bias becomes a last input 'k' unless it is None. dtypes: of the outputs.
    """
    own = kernel.own
    arguments, results = (side.split() for side in kernel.axes.split("->"))
    if key_bias is not None:
        arguments, inputs = [*arguments, "k"], (*inputs, key_bias)

    def run(*arrays):
        size = {axis: n for names, x in zip(arguments, arrays) for axis, n in zip(names, x.shape)}

        def spec(names):
            block = [
                None if axis in "bn" else tile.own if axis == own else size[axis] for axis in names
            ]
            return pl.BlockSpec(
                block,
                lambda b, n, i: tuple({"b": b, "n": n, own: i}.get(axis, 0) for axis in names),
            )

        return pl.pallas_call(
            functools.partial(kernel.function, step=tile.step, scale=LOG2E / math.sqrt(size["h"])),
            grid=(size["b"], size["n"], size[own] // tile.own),
            in_specs=[spec(names) for names in arguments],
            out_specs=tuple(spec(names) for names in results),
            out_shape=tuple(
                jax.ShapeDtypeStruct([size[axis] for axis in names], dtype)
                for names, dtype in zip(results, dtypes)
            ),
            compiler_params=plt.CompilerParams(num_warps=tile.warps, num_stages=1),
            interpret=interpret,
            name=kernel.name,
        )(*arrays)

    def partition(mesh, argument_shapes, result_shapes):
        # videos and heads are split as those of q, everything else is replicated
        split = dict(zip(arguments[0], argument_shapes[0].sharding.spec))

        def shardings(side):
            return tuple(
                NamedSharding(
                    mesh, P(*(split.get(axis) if axis in "bn" else None for axis in names))
                )
                for names in side
            )

        return mesh, run, shardings(results), shardings(arguments)

    # The compiler cannot look into a kernel: without this rule it gathers every operand on every
    # device.
    partitioned = custom_partitioning(run)
    rule = " -> ".join(
        ", ".join(" ".join(names) for names in side) for side in (arguments, results)
    )
    partitioned.def_partition(partition, sharding_rule=rule)
    return partitioned(*inputs)


def _forward(blocks, interpret, q, k, v, key_bias):
    dtypes = (q.dtype, jnp.float32)
    out, lse = _call(FORWARD, blocks.forward, interpret, (q, k, v), key_bias, dtypes)
    out, lse = (checkpoint_name(x, SAVED) for x in (out, lse))
    return out, (q, k, v, key_bias, out, lse)


def _backward(blocks, interpret, saved, d_out):
    q, k, v, key_bias, out, lse = saved
    d_out = d_out.astype(q.dtype)
    # rowsum(dO O) [B,N,Sq]
    dots = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1).transpose(0, 2, 1)
    inputs = (q, k, v, d_out, lse, dots)
    dk, dv = _call(BACKWARD_KEYS, blocks.keys, interpret, inputs, key_bias, (k.dtype, v.dtype))
    (dq,) = _call(BACKWARD_QUERIES, blocks.queries, interpret, inputs, key_bias, (q.dtype,))
    return dq, dk, dv, None


_attend.defvjp(_forward, _backward)

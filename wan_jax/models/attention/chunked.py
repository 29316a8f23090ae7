"""Exact attention in plain JAX with memory linear in the number of tokens: queries in chunks, each
with whole rows of the softmax.

Without a custom kernel, so it compiles for any platform of XLA. The backward pass saves only the
log-sum-exp of each row and recomputes the probabilities chunk by chunk (Rabe and Staats 2021,
"Self-attention does not need O(n^2) memory"; Dao et al. 2022, "FlashAttention", appendix B.2). On
the CPU that took half to two thirds of the time of `jax.checkpoint` around each chunk.

Shapes: B videos, Sq and Sk tokens, N heads, `rows` queries of a chunk, head_dim.
"""

import functools
import math
from typing import cast

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Float32

LOGITS = 2**20  # elements of the logits of one head in a chunk, 4 MiB in fp32
SAVED = "attention"  # name of what the backward pass needs, for rematerialisation policies
MIN_ROWS = 128  # below, reading k and v for every chunk costs more than the matrix products


def chunk_rows(sq: int, sk: int) -> int:
    """Return the rows of a chunk: LOGITS / Sk but at least MIN_ROWS, about equal for all chunks of
    Sq, and a multiple of 8.
    """
    most = max(MIN_ROWS, LOGITS // sk)
    return 8 * math.ceil(sq / math.ceil(sq / most) / 8)


def chunked_attention(
    q: Float[Array, "B Sq N head_dim"],
    k: Float[Array, "B Sk N head_dim"],
    v: Float[Array, "B Sk N head_dim"],
    key_bias: Float32[Array, " Sk"] | None = None,
) -> Float[Array, "B Sq N head_dim"]:
    """Return softmax(q k^T / sqrt(head_dim) + key_bias) v, computed in chunks of `chunk_rows`
    queries.

    key_bias is not differentiated. Logits, softmax and accumulation are fp32, matrix products are
    in the dtype of q.
    """
    sq, sk = q.shape[1], k.shape[1]
    rows = chunk_rows(sq, sk)
    q = jnp.pad(q, ((0, 0), (0, -sq % rows), (0, 0), (0, 0)))  # zero rows, cut off below
    if key_bias is None:
        key_bias = jnp.zeros(sk, jnp.float32)
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    out = cast(Array, _attend(rows, q, k, v, key_bias))
    return out.transpose(0, 2, 1, 3)[:, :sq]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(rows, q, k, v, key_bias):
    """[B,N,S,head_dim], Sq a multiple of `rows` -> [B,N,Sq,head_dim]."""
    return _forward(rows, q, k, v, key_bias)[0]


def _logits(q, k, key_bias):
    """[B,N,rows,head_dim], [B,N,Sk,head_dim] -> fp32 [B,N,rows,Sk]."""
    return _dot("bnqh,bnkh->bnqk", q, k) * (1 / math.sqrt(q.shape[-1])) + key_bias


def _dot(formula, a, b):
    return jnp.einsum(formula, a, b, preferred_element_type=jnp.float32)


def _chunk(x, i, rows):
    return jax.lax.dynamic_slice_in_dim(x, i * rows, rows, axis=2)


def _join(x):
    """[chunks,B,N,rows,...] -> [B,N,chunks*rows,...]."""
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def _forward(rows, q, k, v, key_bias):
    def one_chunk(i):
        logits = _logits(_chunk(q, i, rows), k, key_bias)  # [B,N,rows,Sk]
        largest = logits.max(-1, keepdims=True)
        weights = jnp.exp(logits - largest)
        total = weights.sum(-1, keepdims=True)
        out = _dot("bnqk,bnkh->bnqh", weights.astype(v.dtype), v) / total
        return out.astype(q.dtype), (largest + jnp.log(total))[..., 0]

    out, lse = map(_join, jax.lax.map(one_chunk, jnp.arange(q.shape[2] // rows)))
    out, lse = (checkpoint_name(x, SAVED) for x in (out, lse))
    return out, (q, k, v, key_bias, lse)


def _backward(rows, saved, d_out):
    """With P = exp(logits - lse) and dP = dO V^T: dV = P^T dO, dS = P (dP - rowsum(P dP)), dQ = dS
    K, dK = dS^T Q.

    A chunk has whole rows, so rowsum(P dP) is computed here and not as rowsum(dO O). That saves
    storing O, and avoids its rounding to bfloat16, which tripled the error of dQ and dK if one
    counted key has most of the weight.
    """
    q, k, v, key_bias, lse = saved
    d_out = d_out.astype(q.dtype)
    scale = 1 / math.sqrt(q.shape[-1])

    def one_chunk(sums, i):
        dk, dv = sums
        q_rows, do_rows, lse_rows = (_chunk(x, i, rows) for x in (q, d_out, lse))
        weights = jnp.exp(_logits(q_rows, k, key_bias) - lse_rows[..., None])  # P [B,N,rows,Sk]
        dv = dv + _dot("bnqk,bnqh->bnkh", weights.astype(q.dtype), do_rows)
        dp = _dot("bnqh,bnkh->bnqk", do_rows, v)
        ds = (weights * (dp - (weights * dp).sum(-1, keepdims=True))).astype(q.dtype)
        dk = dk + _dot("bnqk,bnqh->bnkh", ds, q_rows)
        return (dk, dv), (scale * _dot("bnqk,bnkh->bnqh", ds, k)).astype(q.dtype)

    zeros = jnp.zeros(k.shape, jnp.float32)
    (dk, dv), dq = jax.lax.scan(one_chunk, (zeros, zeros), jnp.arange(q.shape[2] // rows))
    return _join(dq), (scale * dk).astype(k.dtype), dv.astype(v.dtype), None


_attend.defvjp(_forward, _backward)

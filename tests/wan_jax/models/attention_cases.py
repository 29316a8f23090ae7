"""Random operands of attention, its results in float64, and the comparison with them.

Tolerances are relative in the 2-norm. fp32: 5e-6, some tens of roundings of 2^-24 (8e-7 seen).
bf16: 1e-2, a few roundings of 2^-9 in the probabilities, their gradients and the results (2.6e-3
seen; 7e-3 for `pallas`, which like every flash attention takes rowsum(dO O) from the rounded
output, where one counted key has most of the weight).
"""

import jax
import jax.numpy as jnp
import numpy as np

TOLERANCE = {"float32": 5e-6, "bfloat16": 1e-2}
OPERANDS = ("out", "dq", "dk", "dv")


def draw(sq, sk, dtype, *, batch=2, heads=2, head_dim=64):
    """q, k, v and the gradient of the output, rounded to dtype; logits spread over some +-4."""
    rng = np.random.default_rng(sq + sk)
    shapes = (
        (batch, sq, heads, head_dim),
        *((batch, sk, heads, head_dim),) * 2,
        (batch, sq, heads, head_dim),
    )
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def exact(q, k, v, d_out, counts=None):
    """(out, dq, dk, dv) in float64, every counted key written out as often as it counts."""
    q, k, v, d_out = (np.asarray(x, np.float64) for x in (q, k, v, d_out))
    index = np.arange(k.shape[1]) if counts is None else np.repeat(np.arange(k.shape[1]), counts)
    many_k, many_v = k[:, index], v[:, index]
    logits = np.einsum("bqnh,bknh->bnqk", q, many_k) / np.sqrt(q.shape[-1])
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    dp = np.einsum("bqnh,bknh->bnqk", d_out, many_v)
    ds = p * (dp - (p * dp).sum(-1, keepdims=True)) / np.sqrt(q.shape[-1])
    dk, dv = np.zeros_like(k), np.zeros_like(v)
    np.add.at(dk, (slice(None), index), np.einsum("bnqk,bqnh->bknh", ds, q))
    np.add.at(dv, (slice(None), index), np.einsum("bnqk,bqnh->bknh", p, d_out))
    return np.einsum("bnqk,bknh->bqnh", p, many_v), np.einsum("bnqk,bknh->bqnh", ds, many_k), dk, dv


def computed(function, q, k, v, d_out):
    @jax.jit
    def both(q, k, v, d_out):
        out, pull = jax.vjp(function, q, k, v)
        return out, *pull(d_out)

    return both(q, k, v, d_out)


def relative_error(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def assert_close(results, expected, tolerance):
    errors = {
        name: relative_error(*pair)
        for name, pair in zip(OPERANDS, zip(results, expected, strict=True))
    }
    assert all(error < tolerance for error in errors.values()), errors

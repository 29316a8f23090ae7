"""The one attention seam: every attention of the transformer goes through `attention`.

The backend is chosen once by `choose_backend`, logged by name, and carried as a static attribute of the model; an
impossible request is an error, never a silent fallback.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

BACKENDS = ("auto", "xla", "cudnn")


def choose_backend(name: str, platform: str, dtype, head_dim: int) -> str:
    """'auto' to a concrete backend: cuDNN flash attention on NVIDIA GPUs in 16-bit types, XLA's otherwise.

    platform: as in `jax.devices()[0].platform` ('cpu', 'gpu'/'cuda', 'rocm'). Raises ValueError on an unknown name and
    where 'cudnn' cannot run (not NVIDIA, fp32, head_dim over 128 or not a multiple of 8).
    """
    if name not in BACKENDS:
        raise ValueError(f"attention={name!r} is unknown; choose one of {', '.join(BACKENDS)}")
    obstacle = None
    if platform not in ("gpu", "cuda"):
        obstacle = f"the device is {platform!r}, not an NVIDIA GPU"
    elif jnp.dtype(dtype).itemsize != 2:
        obstacle = f"the model computes in {jnp.dtype(dtype).name}, cuDNN's flash attention in bfloat16 or float16"
    elif head_dim > 128 or head_dim % 8:
        obstacle = f"head_dim {head_dim} is not a multiple of 8 up to 128"
    if name == "cudnn" and obstacle:
        raise ValueError(f"attention='cudnn' cannot run here: {obstacle}; use attention='auto' or 'xla'")
    return "xla" if name == "xla" or obstacle else "cudnn"


def attention(q: jax.Array, k: jax.Array, v: jax.Array, *, backend: str,
              key_counts: np.ndarray | None = None) -> jax.Array:
    """softmax(q k^T / sqrt(head_dim)) v, without mask.

    q [B, Sq, N, head_dim], k and v [B, Sk, N, head_dim] -> [B, Sq, N, head_dim] in q's dtype; softmax in fp32.
    key_counts, static int [Sk]: key j stands for that many identical keys. Wan pads the text to 512 rows whose
    projections are all alike; counting the row instead of repeating it gives the same softmax for a tenth of the work.
    """
    if backend == "cudnn":
        if key_counts is not None:
            k, v = repeat_keys(k, key_counts), repeat_keys(v, key_counts)
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    logits = jnp.einsum("bqnh,bknh->bnqk", q, k, preferred_element_type=jnp.float32) * (1 / math.sqrt(q.shape[-1]))
    if key_counts is not None:
        logits = logits + jnp.log(jnp.asarray(key_counts, jnp.float32))
    weights = jax.nn.softmax(logits, axis=-1).astype(q.dtype)
    return jnp.einsum("bnqk,bknh->bqnh", weights, v)


def repeat_keys(x: jax.Array, counts: np.ndarray) -> jax.Array:
    """x [B, Sk, N, head_dim] with row j repeated counts[j] times.

    By slices and broadcasts: the gradient of a gather is a scatter, which took half of a 1.3B update on an H200.
    """
    parts, start = [], 0
    while start < len(counts):
        single = next((j for j in range(start, len(counts)) if counts[j] != 1), len(counts))
        if single > start:
            parts.append(x[:, start:single])
        if single < len(counts):
            parts.append(jnp.broadcast_to(x[:, single:single + 1], (x.shape[0], int(counts[single]), *x.shape[2:])))
        start = single + 1
    return jnp.concatenate(parts, axis=1)

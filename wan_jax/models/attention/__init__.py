"""The one attention seam: every attention of the transformer goes through `attention`.

The backend is chosen once by `choose_backend`, logged by name, and carried as a static attribute of
the model; an impossible request is an error, never a silent fallback.

- `cudnn`: cuDNN's flash attention; NVIDIA, 16-bit types.
- `chunked`: queries in chunks, in plain JAX (`attention_chunked.py`); everywhere, memory linear in
  the tokens.
- `pallas`: our fused Triton kernels (`attention_pallas.py`); AMD and NVIDIA GPUs, 16-bit types;
  never run on AMD.
- `xla`: logits and softmax as written; everywhere, memory quadratic in the tokens.

`auto` is `cudnn` where that runs and `chunked` elsewhere. All four take any lengths and any
`key_counts`.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from wan_jax.choices import BACKENDS
from wan_jax.models.attention.chunked import chunked_attention


def platform_of(device: jax.Device) -> str:
    """'cpu', 'cuda' or 'rocm': JAX itself calls AMD's and NVIDIA's devices both 'gpu'."""
    if device.platform != "gpu":
        return device.platform
    return "cuda" if "cuda" in device.client.platform_version.lower() else "rocm"


def choose_backend(name: str, platform: str, dtype, head_dim: int) -> str:
    """'auto' to a concrete backend: cuDNN on NVIDIA GPUs in 16-bit types, chunked attention
    everywhere else.

    platform: of `platform_of`. 'pallas' is never chosen by 'auto': its kernels have not run on an
    AMD GPU. Raises ValueError on an unknown name and where 'cudnn' (not NVIDIA, fp32, head_dim over
    128 or not a multiple of 8) or 'pallas' (no GPU, fp32, head_dim not 16, 32, 64 or 128) cannot
    run.
    """
    if name not in BACKENDS:
        raise ValueError(f"attention={name!r} is unknown; choose one of {', '.join(BACKENDS)}")
    if platform == "gpu":
        raise ValueError(
            "platform='gpu' may be NVIDIA's or AMD's; pass attention.platform_of(device)"
        )
    if name in ("xla", "chunked"):
        return name
    obstacle = None
    if name == "pallas":
        if platform not in ("cuda", "rocm"):
            obstacle = f"the device is {platform!r}, not an AMD or NVIDIA GPU"
        elif head_dim not in (16, 32, 64, 128):
            obstacle = f"head_dim {head_dim} is not one of 16, 32, 64, 128"
    elif platform != "cuda":
        obstacle = f"the device is {platform!r}, not an NVIDIA GPU"
    elif head_dim > 128 or head_dim % 8:
        obstacle = f"head_dim {head_dim} is not a multiple of 8 up to 128"
    if obstacle is None and jnp.dtype(dtype).itemsize != 2:
        obstacle = (
            f"the model computes in {jnp.dtype(dtype).name}, these kernels in bfloat16 or float16"
        )
    if name == "auto":
        return "chunked" if obstacle else "cudnn"
    if obstacle:
        raise ValueError(
            f"attention={name!r} cannot run here: {obstacle}; use attention='auto', 'chunked' or "
            "'xla'"
        )
    return name


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *, backend: str, key_counts: np.ndarray | None = None
) -> jax.Array:
    """softmax(q k^T / sqrt(head_dim)) v, without mask.

    q [B, Sq, N, head_dim], k and v [B, Sk, N, head_dim] -> [B, Sq, N, head_dim] in q's dtype;
    softmax in fp32. key_counts, static int [Sk]: key j stands for that many identical keys. Wan
    pads the text to 512 rows whose projections are all alike; counting the row instead of repeating
    it gives the same softmax for a tenth of the work. Raises ValueError on counts that are not Sk
    positive integers.
    """
    key_bias = None
    if key_counts is not None:
        counts = np.asarray(key_counts)
        if counts.shape != k.shape[1:2] or counts.dtype.kind not in "iu" or counts.min() < 1:
            raise ValueError(
                f"key_counts={key_counts} must be {k.shape[1]} positive integers, one a key"
            )
        # c equal terms exp(x) sum to exp(x + log c)
        key_bias = jnp.asarray(np.log(counts), jnp.float32)
    if backend == "cudnn":
        return _cudnn(
            q, *((k, v) if key_counts is None else (repeat_keys(x, counts) for x in (k, v)))
        )
    if backend == "chunked":
        return chunked_attention(q, k, v, key_bias)
    if backend == "pallas":
        from wan_jax.models.attention.pallas import (
            pallas_attention,  # Triton's part of Pallas loads only where it is used
        )

        return pallas_attention(q, k, v, key_bias)
    logits = jnp.einsum("bqnh,bknh->bnqk", q, k, preferred_element_type=jnp.float32) * (
        1 / math.sqrt(q.shape[-1])
    )
    if key_bias is not None:
        logits = logits + key_bias
    weights = jax.nn.softmax(logits, axis=-1).astype(q.dtype)
    return jnp.einsum("bnqk,bknh->bqnh", weights, v)


def _cudnn(q, k, v):
    """cuDNN's flash attention; JAX refuses to differentiate it at odd lengths, so these get one row
    more, masked.

    Counted keys come repeated, not biased: cuDNN takes a bias in the 16-bit type only, where
    exp(log 448) is 1.1 % short, and JAX always asks for the bias' gradient, which cuDNN gives only
    for one video and a bias of each head.
    """
    sq, sk = q.shape[1], k.shape[1]
    q, k, v = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (q, k, v))
    lengths = jnp.full(k.shape[0], sk, jnp.int32) if sk % 2 else None
    return jax.nn.dot_product_attention(
        q, k, v, key_value_seq_lengths=lengths, implementation="cudnn"
    )[:, :sq]


def repeat_keys(x: jax.Array, counts: np.ndarray) -> jax.Array:
    """x [B, Sk, N, head_dim] with row j repeated counts[j] times.

    By slices and broadcasts: the gradient of a gather is a scatter, which took half of a 1.3B
    update on an H200.
    """
    parts, start = [], 0
    while start < len(counts):
        single = next((j for j in range(start, len(counts)) if counts[j] != 1), len(counts))
        if single > start:
            parts.append(x[:, start:single])
        if single < len(counts):
            parts.append(
                jnp.broadcast_to(
                    x[:, single : single + 1], (x.shape[0], int(counts[single]), *x.shape[2:])
                )
            )
        start = single + 1
    return jnp.concatenate(parts, axis=1)

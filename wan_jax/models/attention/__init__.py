"""The only entry to attention: every attention of the transformer calls `attention`.

`choose_backend` chooses the backend once; it is logged by name and is a static attribute of the
model. An impossible request is an error, never a silent fallback.

- `cudnn`: cuDNN's flash attention; NVIDIA GPUs, 16-bit types.
- `chunked`: queries in chunks, in plain JAX (`chunked.py`); everywhere, memory linear in the
  tokens.
- `pallas`: our fused Triton kernels (`pallas.py`); AMD and NVIDIA GPUs, 16-bit types; has not run
  on a GPU yet.
- `xla`: logits and softmax as written; everywhere, memory quadratic in the tokens.

`auto` is `cudnn` where that runs and `chunked` elsewhere. All four accept any lengths and any
`key_counts`.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from wan_jax.choices import BACKENDS
from wan_jax.models.attention.chunked import SAVED, chunked_attention

# cuDNN's attention with what its backward pass needs, in JAX
CUDNN_FORWARD = "dot_product_attention_fwd_wrapper"


def platform_of(device: jax.Device) -> str:  # pyright: ignore[reportInvalidTypeForm]
    """Return 'cpu', 'cuda' or 'rocm'; JAX's own name for the GPUs of NVIDIA and AMD is 'gpu'."""
    if device.platform != "gpu":
        return device.platform
    return "cuda" if "cuda" in device.client.platform_version.lower() else "rocm"


def choose_backend(name: str, platform: str, dtype, head_dim: int) -> str:
    """Return the concrete backend for a name; 'auto' is cuDNN on NVIDIA GPUs in 16-bit types,
    chunked attention elsewhere.

    platform: of `platform_of`. 'auto' never chooses 'pallas', because its kernels have not run on
    a GPU yet. Raises ValueError on an unknown name and where 'cudnn' (not NVIDIA, fp32, head_dim
    over 128 or not a multiple of 8) or 'pallas' (no GPU, fp32, head_dim not 16, 32, 64 or 128)
    cannot run.
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


def save_attention(primitive, *_, **params) -> bool:
    """A policy for `jax.checkpoint`: save what the backward pass of attention needs of the forward pass, the
    result and a number for each query and head. Of `xla` nothing is saved.
    """
    return primitive.name == CUDNN_FORWARD or params.get("name") == SAVED


def attention(
    q: Float[Array, "B Sq N head_dim"],
    k: Float[Array, "B Sk N head_dim"],
    v: Float[Array, "B Sk N head_dim"],
    *,
    backend: str,
    key_counts: Int[np.ndarray, " Sk"] | None = None,
) -> Float[Array, "B Sq N head_dim"]:
    """Return softmax(q k^T / sqrt(head_dim)) v without a mask, in the dtype of q; softmax in fp32.

    key_counts: static; key j stands for key_counts[j] identical keys. Wan pads the text to 512 rows
    with identical projections; counting that row instead of repeating it gives the same softmax for
    a tenth of the work. Raises ValueError on counts that are not Sk positive integers.
    """
    counts = None if key_counts is None else np.asarray(key_counts)
    key_bias = None
    if counts is not None:
        if counts.shape != k.shape[1:2] or counts.dtype.kind not in "iu" or counts.min() < 1:
            raise ValueError(
                f"key_counts={key_counts} must be {k.shape[1]} positive integers, one a key"
            )
        # count equal terms exp(x) sum to exp(x + log(count))
        key_bias = jnp.asarray(np.log(counts), jnp.float32)
    if backend == "cudnn":
        if counts is not None:
            k, v = repeat_keys(k, counts), repeat_keys(v, counts)
        return _cudnn(q, k, v)
    if backend == "chunked":
        return chunked_attention(q, k, v, key_bias)
    if backend == "pallas":
        # imported here, so that Triton's part of Pallas is loaded only where it is used
        from wan_jax.models.attention.pallas import pallas_attention

        return pallas_attention(q, k, v, key_bias)
    logits = jnp.einsum("bqnh,bknh->bnqk", q, k, preferred_element_type=jnp.float32) * (
        1 / math.sqrt(q.shape[-1])
    )
    if key_bias is not None:
        logits = logits + key_bias
    weights = jax.nn.softmax(logits, axis=-1).astype(q.dtype)
    return jnp.einsum("bnqk,bknh->bqnh", weights, v)


def _cudnn(q, k, v):
    """Compute cuDNN's flash attention. JAX refuses to differentiate it at odd lengths, so these are
    padded by one row, which is masked.

    Counted keys are repeated instead of biased: cuDNN takes a bias only in the 16-bit type, where
    exp(log 448) is 1.1 % too small, and JAX always requests the gradient of the bias, which cuDNN
    computes only for one video and a bias per head.
    """
    sq, sk = q.shape[1], k.shape[1]
    q, k, v = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (q, k, v))
    lengths = jnp.full(k.shape[0], sk, jnp.int32) if sk % 2 else None
    return jax.nn.dot_product_attention(
        q, k, v, key_value_seq_lengths=lengths, implementation="cudnn"
    )[:, :sq]


def repeat_keys(
    x: Float[Array, "B Sk N head_dim"], counts: Int[np.ndarray, " Sk"]
) -> Float[Array, "B repeated N head_dim"]:
    """Repeat row j of x counts[j] times.

    With slices and broadcasts, because the gradient of a gather is a scatter, which took half of
    the time of a 1.3B update on an H200.
    """
    pieces = []
    start = 0
    while start < len(counts):
        # rows that are not repeated, up to the next one that is
        repeated = next((j for j in range(start, len(counts)) if counts[j] != 1), len(counts))
        if repeated > start:
            pieces.append(x[:, start:repeated])
        if repeated < len(counts):
            row = x[:, repeated : repeated + 1]
            shape = (x.shape[0], int(counts[repeated]), *x.shape[2:])
            pieces.append(jnp.broadcast_to(row, shape))
        start = repeated + 1
    return jnp.concatenate(pieces, axis=1)

"""How exactly matrix products and convolutions of float32 values are computed.

    default    as the backend does by default: float32 on the CPU; on NVIDIA GPUs TF32, whose products
               have 10 bits instead of 23, about 1e-3 of relative error in each
    tf32       TF32 where the hardware has it
    float32    float32 on every backend

These are JAX's precisions DEFAULT, HIGH and HIGHEST. PyTorch computes products in float32 by
default and cuDNN's convolutions in TF32. Products of bfloat16 values are the same in all three: XLA
multiplies them exactly and sums them in float32.
"""

import jax

from wan_jax.choices import MATMUL_PRECISIONS

JAX_NAMES = dict(zip(MATMUL_PRECISIONS, (None, "tensorfloat32", "float32")))


def use(precision: str) -> None:
    """Compute all later products in one of `MATMUL_PRECISIONS`, in all threads. `default` changes
    nothing, so JAX_DEFAULT_MATMUL_PRECISION in the environment has its effect.

    Raises ValueError on another name.
    """
    if precision not in JAX_NAMES:
        raise ValueError(
            f"matmul_precision={precision!r} is unknown; choose one of {', '.join(JAX_NAMES)}"
        )
    if JAX_NAMES[precision] is not None:
        jax.config.update("jax_default_matmul_precision", JAX_NAMES[precision])


def is_exact() -> bool:
    """Return whether products of float32 values are computed in float32 on JAX's default backend."""
    setting = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    return jax.default_backend() == "cpu" or setting in ("float32", "highest")


def for_dtype(precision: str, dtype, platform: str) -> str:
    """Return the precision that sampling uses: `auto` is float32 where float32 weights were asked
    for on an accelerator, and else `default`. platform: of `attention.platform_of`.
    """
    if precision != "auto":
        return precision
    return "float32" if dtype == "float32" and platform != "cpu" else "default"


def describe(precision: str, platform: str) -> str:
    """Return how float32 products are computed, as text."""
    setting = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    if precision == "default" and setting is not None:
        return f"{setting} by JAX_DEFAULT_MATMUL_PRECISION"
    if platform == "cuda" and precision == "default":
        return "TF32, the default of this backend"
    return {"default": "the default of this backend", "tf32": "TF32"}.get(precision, precision)

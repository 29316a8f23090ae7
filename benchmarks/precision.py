"""Measures error and time of a matrix product and a convolution in each `matmul_precision`.

    python -m benchmarks.precision

For float32 on an NVIDIA GPU, `default` and `tf32` should have errors of about 3e-4 and `float32` of
about 1e-7, at a fraction of the speed. The rows of bfloat16 should be equal in error and time. On
the CPU all rows of a type are equal.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np

from wan_jax.choices import DTYPES, MATMUL_PRECISIONS
from wan_jax.models import precision

SIZE = 4096  # rows and columns of the matrices
CHECKED = 64  # rows that are compared with float64
REPEATS = 20


def main():
    size = SIZE if jax.default_backend() != "cpu" else SIZE // 8
    keys = jax.random.split(jax.random.key(0), 4)
    a, b = (jax.random.normal(key, (size, size)) for key in keys[:2])
    video = jax.random.normal(keys[2], (1, 4, size // 32, size // 32, 96))
    kernel = jax.random.normal(keys[3], (3, 3, 3, 96, 96))

    def product(a, b):
        return a @ b

    def convolution(video, kernel):
        axes = ("NTHWC", "THWIO", "NTHWC")
        return jax.lax.conv_general_dilated(
            video, kernel, (1, 1, 1), "SAME", dimension_numbers=axes
        )

    print(f"{jax.devices()[0].device_kind}; product of {size} x {size}, convolution of 96 channels")
    for dtype in DTYPES:
        for name in MATMUL_PRECISIONS:
            with jax.default_matmul_precision(precision.JAX_NAMES[name]):
                x, y = a.astype(dtype), b.astype(dtype)
                result, milliseconds = measure(product, x, y)
                exact = np.asarray(x[:CHECKED], np.float64) @ np.asarray(y, np.float64)
                error = np.linalg.norm(result[:CHECKED] - exact) / np.linalg.norm(exact)
                _, conv = measure(convolution, video.astype(dtype), kernel.astype(dtype))
            print(
                f"{dtype:9} {name:8} product: relative error {error:.1e}, {milliseconds:.3f} ms; "
                f"convolution: {conv:.3f} ms"
            )


def measure(function, *arguments) -> tuple[np.ndarray, float]:
    """Return the result in float64 and the milliseconds of a call."""
    compiled = jax.jit(function)
    result = jax.block_until_ready(compiled(*arguments))
    start = time.perf_counter()
    for _ in range(REPEATS):
        result = compiled(*arguments)
    jax.block_until_ready(result)
    milliseconds = (time.perf_counter() - start) / REPEATS * 1e3
    return np.asarray(result.astype(jnp.float32), np.float64), milliseconds


if __name__ == "__main__":
    main()

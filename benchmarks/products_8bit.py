"""Compares products in 8 bits with those of Qwix and in bf16, and the kernel between two of them with
the plain code, a JSON line for each.

    python -m benchmarks.products_8bit
    python -m benchmarks.products_8bit --parts=gelu --warps=4,8,16

products   9216 x K x N of 1.3B: bf16 inputs, weights in bf16, fp8 and int8. Qwix, if it is installed,
           rounds the input to the weights' type; this project's int8 is dequantised. A line whose
           product fails gives the reason.
gelu       scales, bias, GELU and rounding to fp8 after the first product of a feed-forward network,
           9 pictures of 512x512: milliseconds, GB/s of the arrays that a single pass must read and
           write, relative error between kernel and plain code
"""

import json
from collections.abc import Callable

import jax
import jax.numpy as jnp
from absl import app, flags

from benchmarks import attention, workload
from grpo.learning.policy import COMPILER_OPTIONS
from wan_jax.distributed import memory
from wan_jax.models import gelu_kernel, quantised
from wan_jax.models.attention import platform_of
from wan_jax.models.layers import Rounded, gelu, gelu_bound
from wan_jax.models.quantised import Quantisation

VIDEOS, TOKENS = 9, 1024
PRODUCTS = [(1536, 8960), (1536, 1536), (8960, 1536)]  # of 1.3B


def compiled(function, arguments):
    """Compile a function with the options of rollout and update."""
    options = COMPILER_OPTIONS if jax.default_backend() == "gpu" else None
    return jax.jit(function).lower(*arguments).compile(options)


def largest_error(found, wanted) -> float:
    """Return the largest relative error of the arrays of two results."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    return max(attention.error(x.astype(jnp.float32), y.astype(jnp.float32)) for x, y in pairs)


def quantisation_here(kind: str) -> Quantisation:
    """Return how this device stores weights of a kind."""
    device = jax.devices()[0]
    chosen = Quantisation.choose(kind, platform_of(device), device)
    assert chosen is not None
    return chosen


# ---- products --------------------------------------------------------------------------------------
def product_cases(weight: jax.Array, how: dict[str, Quantisation]) -> dict[str, Callable]:
    """Return {name: function of x} of products with a weight [K, N]."""
    found = {"bf16": lambda x: x @ weight}
    for kind, quantisation in how.items():
        values, scales = jax.jit(quantisation.quantise)(weight)

        def ours(x, values=values, scales=scales, quantisation=quantisation):
            if quantisation.native:
                bound = jnp.abs(x).max(-1, keepdims=True)
                return quantised.product_8bit(x, values, scales, bound).astype(x.dtype)
            return x @ quantisation.dequantise(values, scales, x.dtype).T

        found[kind] = ours
    try:
        import qwix  # pyright: ignore[reportMissingImports]
    except ImportError as failure:
        print(json.dumps({"skipped": f"Qwix is not installed ({failure}): pip install qwix"}))
        return found
    for kind, quantisation in how.items():
        stored = jax.jit(
            lambda w, dtype=quantisation.dtype: qwix.quantize(w.T, dtype, channelwise_axes=[0])
        )(weight)

        def theirs(x, stored=stored, dtype=quantisation.dtype):
            rounded = qwix.quantize(x, dtype, channelwise_axes=[0])
            dimensions = (((1,), (1,)), ((), ()))
            return qwix.dot_general(rounded, stored, dimensions).astype(x.dtype)

        found[f"{kind} by Qwix"] = theirs
    return found


def measure_products(repeats: int, line: Callable[[dict], None]) -> None:
    """Report all products. line: prints a record."""
    how = {kind: quantisation_here(kind) for kind in ("fp8", "int8")}
    for n_in, n_out in PRODUCTS:
        keys = jax.random.split(jax.random.key(2))
        x = jax.random.normal(keys[0], (VIDEOS * TOKENS, n_in), jnp.bfloat16)
        weight = jax.random.normal(keys[1], (n_in, n_out), jnp.bfloat16) * n_in**-0.5
        wanted = x @ weight
        for name, function in product_cases(weight, how).items():
            record = {"product": f"{len(x)}x{n_in}x{n_out}", "by": name}
            try:
                program = compiled(function, (x,))
                ms = attention.milliseconds(program, (x,), repeats)
            # the others are measured where a library has no such product for this device
            except Exception as failure:
                line(record | {"failed": f"{type(failure).__name__}: {str(failure)[:300]}"})
                continue
            rate, error = 2 * len(x) * n_in * n_out / ms / 1e9, largest_error(program(x), wanted)
            line(record | {"ms": round(ms, 4), "tflops": round(rate), "error": round(error, 4)})


# ---- GELU ------------------------------------------------------------------------------------------
def plain_gelu(product, rows, scale, bias, fp8) -> Rounded:
    """Compute `gelu_kernel.gelu_rows` as `transformer.GELUProjection` does without it."""
    y = quantised.scaled(product, rows, scale, bias).astype(product.dtype)
    activation = gelu(y.astype(jnp.float32)).astype(y.dtype)
    return quantised.quantise_rows(activation, gelu_bound(y.max(-1, keepdims=True)), fp8)


def measure_gelu(size: str, warps: list[int], repeats: int, line: Callable[[dict], None]) -> None:
    """Report the kernel with several numbers of warps, and the plain code. line: prints a record."""
    width, fp8 = workload.transformer_config(size).ffn_dim, quantisation_here("fp8").dtype
    keys = jax.random.split(jax.random.key(0), 3)
    product = jax.random.normal(keys[0], (VIDEOS, TOKENS, width), jnp.bfloat16)
    rows = jnp.ones((VIDEOS, TOKENS, 1))
    scale = jnp.abs(jax.random.normal(keys[1], (width,)))
    arguments = product, rows, scale, jax.random.normal(keys[2], (width,), jnp.bfloat16)

    def run(name: str, function: Callable):
        # a function of its own, so that JAX traces it again
        program = compiled(lambda *arrays: function(*arrays, fp8), arguments)
        ms = attention.milliseconds(program, arguments, repeats)
        rate = 3 * product.size / ms / 1e6
        record = {"gelu": size, "by": name, "ms": round(ms, 4), "gb_s": round(rate)}
        return record, program(*arguments)

    record, wanted = run("plain", plain_gelu)
    line(record)
    default = gelu_kernel.WARPS
    try:
        for gelu_kernel.WARPS in warps:
            record, found = run(f"kernel, {gelu_kernel.WARPS} warps", gelu_kernel.gelu_rows)
            line(record | {"difference": float(f"{largest_error(found, wanted):.2g}")})
    finally:
        gelu_kernel.WARPS = default


def main(_):
    settings = flags.FLAGS
    memory.allow_pinned()
    about = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}

    def line(record: dict):
        print(json.dumps(record | about), flush=True)

    if "products" in settings.parts:
        measure_products(settings.calls, line)
    if "gelu" in settings.parts:
        for size in settings.sizes:
            measure_gelu(size, [int(n) for n in settings.warps], settings.calls, line)


if __name__ == "__main__":
    flags.DEFINE_list("parts", ["products", "gelu"], "of products, gelu")
    flags.DEFINE_list("sizes", ["1.3b", "14b"], "sizes of the transformer")
    flags.DEFINE_list("warps", [str(gelu_kernel.WARPS)], "warps of a program of GELU's kernel")
    flags.DEFINE_integer("calls", 20, "calls of a function in a row that are timed together")
    app.run(main)

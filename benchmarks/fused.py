"""Compares the fused kernels (`wan_jax/models/fused`) with the plain code, a JSON line for each.

    python -m benchmarks.fused --parts=kernels,steps
    python -m benchmarks.fused --parts=tiles --sizes 1.3b
    python -m benchmarks.fused --parts=steps --sizes 14b --remat block
    python -m benchmarks.fused --parts=qwix

kernels    each kernel alone against the plain code that it replaces, for 9 pictures of 512x512:
           milliseconds, GB/s of the arrays that a single pass must read and write, relative error
           between both
tiles      the kernels with other rows and warps of a program
steps      rollout and update step of `benchmarks.full_size` with weights in fp8, plain and fused; the
           flags are those of that benchmark, the size is the first of `--sizes`
qwix       products 9216 x K x N of bf16 inputs with weights in fp8 and int8: by Qwix, if that is
           installed, which rounds the input to the weights' type, and by this project, whose int8 is
           dequantised. A line whose product fails gives the reason.
"""

import dataclasses
import functools
import json
from collections.abc import Callable

import jax
import jax.numpy as jnp
from absl import app, flags

from benchmarks import attention, full_size, workload
from grpo.learning.policy import COMPILER_OPTIONS
from wan_jax.distributed import memory
from wan_jax.models import fused, quantised
from wan_jax.models.attention import platform_of
from wan_jax.models.fused import calls
from wan_jax.models.layers import Dense, gelu
from wan_jax.models.positions import rotation
from wan_jax.models.quantised import Quantisation

VIDEOS, TOKENS, HEAD_DIM, EPS = 9, 1024, 128, 1e-6
TILES = [calls.Tile(rows, warps) for rows in (1, 2, 4, 16, 32) for warps in (4, 8)]
PRODUCTS = [(1536, 8960), (1536, 1536), (8960, 1536)]  # of 1.3B
LEAST_ROWS = 16  # of kernels with a product


@dataclasses.dataclass(frozen=True)
class Case:
    """A kernel, the plain code, and their arguments.

    Attributes:
        tile: name of its tiling in `calls.Tiles`.
        moved: bytes that one pass reads and writes.
    """

    name: str
    tile: str
    fused: Callable
    plain: Callable
    arguments: tuple
    moved: int


def draw_dense(width: int, parts: int, *, scaled: bool, adapted: bool) -> Dense:
    """Draw a dense layer's product, scales, bias and adapters."""
    keys = iter(jax.random.split(jax.random.key(0), 6))

    def draw(*shape, dtype=jnp.bfloat16):
        return jax.random.normal(next(keys), shape, dtype)

    rank, outputs = workload.RANK, parts * width
    return Dense(
        draw(VIDEOS, TOKENS, outputs),
        draw(outputs),
        jnp.ones((VIDEOS, TOKENS, 1)) if scaled else None,
        jnp.abs(draw(outputs, dtype=jnp.float32)) if scaled else None,
        draw(VIDEOS, TOKENS, parts * rank) if adapted else None,
        draw(rank, outputs) / rank if adapted else None,
    )


def cases(size: str, fp8) -> list[Case]:
    """Return the kernels at the widths of a model."""
    config = workload.transformer_config(size)
    width, hidden = config.width, config.ffn_dim
    array = VIDEOS * TOKENS * width  # elements
    key = jax.random.key(1)
    angle = jax.random.uniform(key, (TOKENS, HEAD_DIM // 2), maxval=6.0)
    weights = [jnp.ones(width, jnp.bfloat16)] * 2
    qkv = draw_dense(width, 3, scaled=True, adapted=True)
    of_text = draw_dense(width, 1, scaled=False, adapted=True)
    x = jax.random.normal(key, (VIDEOS, TOKENS, width), jnp.bfloat16)
    vector = jax.random.normal(key, (VIDEOS, width))
    ffn = draw_dense(hidden, 1, scaled=True, adapted=False)
    upstream = jax.random.normal(key, ffn.product.shape, jnp.bfloat16)
    found = []

    def add_heads(name, dense, heads, table):
        spec = fused.HeadsSpec(heads, HEAD_DIM, EPS)
        arguments = dense, weights[: sum(head.normed for head in heads)]
        cos_sin = (jnp.cos(angle), jnp.sin(angle)) if table else (None, None)
        signed = rotation(*cos_sin) if table else ()
        found.append(
            Case(
                name,
                "heads",
                lambda dense, weights: fused.heads(spec, dense, weights, *cos_sin),
                lambda dense, weights: fused.plain_heads(spec, dense, weights, signed),
                arguments,
                4 * array * len(heads),
            )
        )

    def add_norm(name, dense, *, kept, rounded):
        spec = fused.NormSpec(EPS, kept=kept, fp8=fp8 if rounded else None)
        bound = jnp.full((VIDEOS, 1, 1), 256.0)

        def ours(dense, x, vector):
            gate = None if dense is None else vector[:, None]
            normed = fused.norm(spec, x, dense, gate, vector[:, None], vector[:, None], bound)
            return normed.x, normed.norm if kept else None, normed.rounded

        def plain(dense, x, vector):
            total, y = fused.plain_norm(spec, dense, x, vector, vector, vector)
            values = quantised.quantise_rows(y, bound, fp8) if rounded else None
            return x if total is None else total, y if kept else None, values

        read = 2 if dense is None else 6  # x, product, sum
        moved = array * (read + 2 * kept + rounded)
        found.append(Case(name, "norm", ours, plain, (dense, x, vector), moved))

    def plain_gelu(dense):
        y = dense.result()
        largest = jnp.maximum(y.max(-1, keepdims=True), 0.25)
        return quantised.quantise_rows(gelu(y.astype(jnp.float32)).astype(y.dtype), largest, fp8)

    def plain_gradient(dense, upstream):
        def activation(product):
            y = dense._replace(product=product).result()
            return gelu(y.astype(jnp.float32)).astype(y.dtype)

        (gradient,) = jax.vjp(activation, dense.product)[1](upstream)
        gradient = jax.lax.optimization_barrier(gradient).astype(jnp.float32) / dense.rows
        return quantised.quantise_rows(gradient, jnp.abs(gradient).max(-1, keepdims=True), fp8)

    def fused_gradient(dense, upstream):
        return fused.gelu_gradient_rows(dense, upstream, jnp.ones((VIDEOS, TOKENS, 1)), fp8)

    rotated, normed = fused.Head(True, True), fused.Head(True, False)
    add_heads("q, k, v", qkv, (rotated, rotated, fused.Head(False, False)), True)
    add_heads("q of cross-attention", of_text, (normed,), False)
    spec = fused.HeadsSpec((rotated, rotated, fused.Head(False, False)), HEAD_DIM, EPS)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    plain_heads = functools.partial(fused.plain_heads, spec, table=rotation(cos, sin))
    arguments = qkv, weights, (x, x, x)
    found.append(
        Case(
            "gradient of q, k, v",
            "heads_gradient",
            lambda dense, weights, upstream: jax.vjp(
                lambda y: fused.heads(spec, y, weights, cos, sin), dense
            )[1](upstream)[0][0],
            lambda dense, weights, upstream: jax.vjp(lambda y: plain_heads(y, weights), dense)[1](
                upstream
            )[0][0],
            arguments,
            4 * array * 3,
        )
    )
    add_norm("norm in bf16 and fp8", None, kept=True, rounded=True)
    add_norm("residual, norm in bf16", of_text, kept=True, rounded=False)
    add_norm("residual, norm in fp8", of_text, kept=False, rounded=True)
    elements = VIDEOS * TOKENS * hidden
    ours = functools.partial(fused.gelu_rows, fp8=fp8)
    found.append(Case("GELU", "gelu", ours, plain_gelu, (ffn,), 3 * elements))
    found.append(
        Case(
            "gradient of GELU",
            "gelu_gradient",
            fused_gradient,
            plain_gradient,
            (ffn, upstream),
            5 * elements,
        )
    )
    return found


def compiled(function, arguments):
    """Compile a function with the options of rollout and update."""
    options = COMPILER_OPTIONS if jax.default_backend() == "gpu" else None
    return jax.jit(function).lower(*arguments).compile(options)


def largest_error(found, wanted) -> float:
    """Return the largest relative error of the arrays of two results."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    return max(attention.error(x.astype(jnp.float32), y.astype(jnp.float32)) for x, y in pairs)


def measure_kernel(case: Case, repeats: int) -> dict:
    """Return the figures of a kernel and of the plain code."""
    functions = [compiled(function, case.arguments) for function in (case.fused, case.plain)]
    ours, plain = (attention.milliseconds(f, case.arguments, repeats) for f in functions)
    results = [function(*case.arguments) for function in functions]
    return {
        "fused_ms": round(ours, 4),
        "plain_ms": round(plain, 4),
        "fused_gb_s": round(case.moved / ours / 1e6),
        "plain_gb_s": round(case.moved / plain / 1e6),
        "difference": float(f"{largest_error(*results):.2g}"),
    }


def measure_tile(case: Case, tile: calls.Tile, repeats: int) -> dict:
    """Return the time of a kernel with a tiling."""
    default = calls.TILES
    try:
        calls.TILES = dataclasses.replace(default, **{case.tile: tile})
        # a function of its own, so that JAX traces it again
        function = compiled(lambda *arguments: case.fused(*arguments), case.arguments)
    finally:
        calls.TILES = default
    ms = attention.milliseconds(function, case.arguments, repeats)
    return {"ms": round(ms, 4), "gb_s": round(case.moved / ms / 1e6)}


def quantisation_here(kind: str) -> Quantisation:
    """Return how this device stores weights of a kind."""
    device = jax.devices()[0]
    chosen = Quantisation.choose(kind, platform_of(device), device)
    assert chosen is not None
    return chosen


def product_cases(weight: jax.Array, how: dict[str, Quantisation]) -> dict:
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


def measure_products(repeats: int, line) -> None:
    """Report products by Qwix and by this project. line: prints a record."""
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


@dataclasses.dataclass(frozen=True)
class Settings:
    """The flags with other values of some."""

    flags: flags.FlagValues
    changed: dict

    def __getattr__(self, name: str):
        return self.changed[name] if name in self.changed else self.flags[name].value


def main(_):
    settings = flags.FLAGS
    memory.allow_pinned()
    device = jax.devices()[0]
    fp8 = quantisation_here("fp8").dtype
    about = {"device": device.device_kind, "jax": jax.__version__}

    def line(record: dict):
        print(json.dumps(record | about), flush=True)

    for size in settings.sizes:
        chosen = cases(size, fp8) if {"kernels", "tiles"} & {*settings.parts} else []
        for case in chosen:
            record = {"size": size, "kernel": case.name}
            if "kernels" in settings.parts:
                line(record | measure_kernel(case, settings.calls))
            for tile in TILES if "tiles" in settings.parts else []:
                if case.tile in ("heads", "heads_gradient", "norm") and tile.rows < LEAST_ROWS:
                    continue
                tiled = record | vars(tile)
                try:
                    line(tiled | measure_tile(case, tile, settings.calls))
                # other tilings still run when this one does not compile
                except Exception as failure:
                    line(tiled | {"failed": f"{type(failure).__name__}: {str(failure)[:200]}"})
        del chosen
    if "qwix" in settings.parts:
        measure_products(settings.calls, line)
    if "steps" in settings.parts:
        for kind in ("off", "pallas"):
            changed = {"size": settings.sizes[0], "weights": "fp8", "fused": kind}
            full_size.measure(Settings(settings, changed))


if __name__ == "__main__":
    full_size.define_flags()
    flags.DEFINE_list("parts", ["kernels", "steps"], "of kernels, tiles, steps, qwix")
    flags.DEFINE_list("sizes", ["1.3b", "14b"], "sizes of the transformer")
    flags.DEFINE_integer("calls", 20, "calls of a kernel in a row that are timed together")
    app.run(main)

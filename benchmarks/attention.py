"""The attention backends side by side: milliseconds, TFLOP/s, memory and error, one JSON line for
each.

    python -m benchmarks.attention [--shapes 9x1024x12,8x3510x12,9x1024x40] [--backends
    cudnn,chunked,pallas,xla]

Every shape is BxSxN at head_dim 128, as self-attention and as cross-attention to 64 text rows and
one that counts 448 times. TFLOP/s count 4 B N Sq Sk head_dim forward and 3.5 times that forward and
backward, as in Dao 2023 ("FlashAttention-2", section 4.1), so recomputation is included; Sk is 65
in cross-attention. Memory is what XLA allots (arguments, results, temporaries). Errors are of the
first video, relative to `xla` in fp32 with exact products. A backend that cannot run here, or
fails, says why in its line.
"""

import functools
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from wan_jax.models.attention import BACKENDS, attention, choose_backend, platform_of

HEAD_DIM = 128
TEXT = np.array([1] * 64 + [448])  # Wan's padding to 512 rows, counted


def both(q, k, v, d_out, *, backend, key_counts):
    """(out, dq, dk, dv)."""
    out, pull = jax.vjp(
        functools.partial(attention, backend=backend, key_counts=key_counts), q, k, v
    )
    return out, *pull(d_out)


def milliseconds(program, arguments, repeats: int) -> float:
    """Median over 5 rounds of the mean of `repeats` calls in a row: dispatch overlaps with the
    device's work.
    """
    rounds = []
    jax.block_until_ready(program(*arguments))
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(repeats):
            result = program(*arguments)
        jax.block_until_ready(result)
        rounds.append((time.perf_counter() - start) / repeats)
    return 1000 * statistics.median(rounds)


def error(got, want) -> float:
    got, want = (np.asarray(x, np.float64) for x in (got, want))
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def measure(backend: str, arrays, key_counts, expected, repeats: int) -> dict:
    q, k = arrays[:2]
    flops = 4 * q.size * k.shape[1]
    line = {}
    forward = functools.partial(attention, backend=backend, key_counts=key_counts)
    for name, function, arguments, work in (
        ("forward", forward, arrays[:3], flops),
        (
            "both",
            functools.partial(both, backend=backend, key_counts=key_counts),
            arrays,
            3.5 * flops,
        ),
    ):
        program = jax.jit(function).lower(*arguments).compile()
        memory = program.memory_analysis()
        used = (
            memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
        )
        ms = milliseconds(program, arguments, repeats)
        line |= {
            f"{name}_ms": round(ms, 3),
            f"{name}_tflops": round(work / ms / 1e9, 1),
            f"{name}_gib": round(used / 2**30, 3),
        }
    results = [x[:1] for x in program(*arrays)]
    return line | {
        f"error_{name}": float(f"{error(*pair):.2g}")
        for name, pair in zip(("out", "dq", "dk", "dv"), zip(results, expected))
    }


def main(_):
    f = flags.FLAGS
    device, dtype = jax.devices()[0], jnp.dtype(f.dtype)
    platform = platform_of(device)
    for shape in f.shapes:
        b, s, n = map(int, shape.split("x"))
        for kind, key_counts in (("self", None), ("cross", TEXT)):
            keys = s if key_counts is None else len(key_counts)
            lengths = (s, keys, keys, s)  # q, k, v, d_out
            arrays = [
                jax.random.normal(jax.random.key(i), (b, length, n, HEAD_DIM), dtype)
                for i, length in enumerate(lengths)
            ]
            with jax.default_matmul_precision("highest"):
                expected = jax.jit(functools.partial(both, backend="xla", key_counts=key_counts))(
                    *(x[:1].astype(jnp.float32) for x in arrays)
                )
            for backend in f.backends:
                line = {
                    "backend": backend,
                    "kind": kind,
                    "B": b,
                    "S": s,
                    "Sk": keys,
                    "N": n,
                    "head_dim": HEAD_DIM,
                    "dtype": dtype.name,
                    "device": device.device_kind,
                    "platform": platform,
                    "jax": jax.__version__,
                }
                try:
                    choose_backend(backend, platform, dtype, HEAD_DIM)
                    line |= measure(backend, arrays, key_counts, expected, f.repeats)
                # out of memory, refused by the compiler: the others still run
                except Exception as failure:
                    line["failed"] = f"{type(failure).__name__}: {str(failure).strip()[:300]}"
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    flags.DEFINE_list(
        "shapes", ["9x1024x12", "8x3510x12", "9x1024x40"], "BxSxN: videos, tokens, heads"
    )
    flags.DEFINE_list("backends", [name for name in BACKENDS if name != "auto"], "which to run")
    flags.DEFINE_string("dtype", "bfloat16", "of q, k and v")
    flags.DEFINE_integer("repeats", 20, "calls in a row, timed together")
    app.run(main)

"""Compares the attention backends: milliseconds, TFLOP/s, memory and error, a JSON line for each.

    python -m benchmarks.attention
    python -m benchmarks.attention --shapes 9x1024x12,8x3510x12 --backends cudnn,chunked,pallas,xla

Every shape is BxSxN with head_dim 128, measured as self-attention and as cross-attention to 64 text
rows and one row that counts 448 times. The work is 4 B N Sq Sk head_dim FLOPs for the forward pass
and 3.5 times that for both passes, which includes recomputation (Dao 2023, "FlashAttention-2",
section 4.1); Sk is 65 in cross-attention. Memory is what XLA allocates for arguments, results and
temporaries. Errors are those of the first video, relative to `xla` in fp32 with exact products. The
line of a backend that cannot run here, or fails, gives the reason.
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
KEY_COUNTS = np.array([1] * 64 + [448])  # 512 text rows, the last of which stands for the padding


def both(q, k, v, d_out, *, backend, key_counts):
    """Return (out, dq, dk, dv) of attention for the output's gradient `d_out` [B, S, N, 128]."""
    out, backward = jax.vjp(
        functools.partial(attention, backend=backend, key_counts=key_counts), q, k, v
    )
    return out, *backward(d_out)


def milliseconds(function, arguments, repeats: int) -> float:
    """Return the median over 5 rounds of the mean time of `repeats` calls in a row.

    Calls in a row hide the time of their dispatch.
    """
    rounds = []
    jax.block_until_ready(function(*arguments))
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(repeats - 1):
            function(*arguments)
        jax.block_until_ready(function(*arguments))
        rounds.append((time.perf_counter() - start) / repeats)
    return 1000 * statistics.median(rounds)


def error(found, expected) -> float:
    """Return the relative error in the Euclidean norm."""
    found, expected = (np.asarray(array, np.float64) for array in (found, expected))
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def measure(backend: str, arrays, key_counts, expected, repeats: int) -> dict:
    """Return the figures of one backend.

    arrays: q, k, v and the output's gradient. expected: (out, dq, dk, dv) of the first video.
    """
    q, k = arrays[:2]
    flops = 4 * q.size * k.shape[1]
    line = {}
    forward = functools.partial(attention, backend=backend, key_counts=key_counts)
    with_backward = functools.partial(both, backend=backend, key_counts=key_counts)
    cases = {
        "forward": (forward, arrays[:3], flops),
        "both": (with_backward, arrays, 3.5 * flops),
    }
    compiled = {
        name: jax.jit(function).lower(*arguments).compile()
        for name, (function, arguments, _) in cases.items()
    }
    for name, (_, arguments, work) in cases.items():
        memory = compiled[name].memory_analysis()
        assert memory is not None
        used = (
            memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
        )
        ms = milliseconds(compiled[name], arguments, repeats)
        line |= {
            f"{name}_ms": round(ms, 3),
            f"{name}_tflops": round(work / ms / 1e9, 1),
            f"{name}_gib": round(used / 2**30, 3),
        }
    results = [result[:1] for result in compiled["both"](*arrays)]
    return line | {
        f"error_{name}": float(f"{error(*pair):.2g}")
        for name, pair in zip(("out", "dq", "dk", "dv"), zip(results, expected))
    }


def main(_):
    settings = flags.FLAGS
    device, dtype = jax.devices()[0], jnp.dtype(settings.dtype)
    platform = platform_of(device)
    for shape in settings.shapes:
        batch, tokens, heads = map(int, shape.split("x"))
        for kind, key_counts in (("self", None), ("cross", KEY_COUNTS)):
            keys = tokens if key_counts is None else len(key_counts)
            lengths = (tokens, keys, keys, tokens)  # q, k, v, d_out
            arrays = [
                jax.random.normal(jax.random.key(i), (batch, length, heads, HEAD_DIM), dtype)
                for i, length in enumerate(lengths)
            ]
            with jax.default_matmul_precision("highest"):
                expected = jax.jit(functools.partial(both, backend="xla", key_counts=key_counts))(
                    *(x[:1].astype(jnp.float32) for x in arrays)
                )
            for backend in settings.backends:
                line = {
                    "backend": backend,
                    "kind": kind,
                    "B": batch,
                    "S": tokens,
                    "Sk": keys,
                    "N": heads,
                    "head_dim": HEAD_DIM,
                    "dtype": dtype.name,
                    "device": device.device_kind,
                    "platform": platform,
                    "jax": jax.__version__,
                }
                try:
                    choose_backend(backend, platform, dtype, HEAD_DIM)
                    line |= measure(backend, arrays, key_counts, expected, settings.repeats)
                # the others still run when this one has no memory or does not compile
                except Exception as failure:
                    line["failed"] = f"{type(failure).__name__}: {str(failure).strip()[:300]}"
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    flags.DEFINE_list(
        "shapes", ["9x1024x12", "8x3510x12", "9x1024x40"], "BxSxN: videos, tokens, heads"
    )
    flags.DEFINE_list(
        "backends", [name for name in BACKENDS if name != "auto"], "backends to measure"
    )
    flags.DEFINE_string("dtype", "bfloat16", "data type of q, k and v")
    flags.DEFINE_integer("repeats", 20, "calls in a row that are timed together")
    app.run(main)

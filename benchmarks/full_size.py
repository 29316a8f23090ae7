"""Rollout step and update step of Wan at full size with random weights: seconds, model FLOP/s and peak memory.

    python -m benchmarks.full_size --size 1.3b [--height 512 --width 512 --frames 1 --batch 9 --guidance 1]

The transformer is the real configuration with weights drawn on the device, LoRA rank 32 on attention; text is 64 rows
of random embeddings padded to 512. Model FLOPs count the matrix products of a forward pass (two for guidance), times
three in the update; recomputation and the reference of --kl are not counted.
"""

import dataclasses
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import nnx

from benchmarks import kernels
from grpo.losses import LossConfig
from grpo.policy import make_policy
from grpo.rollout import StepTable, make_step, rollout
from grpo.update import OptimiserConfig, init_state, make_update, stack_batches
from wan_jax import mesh as mesh_lib
from wan_jax.attention import choose_backend, platform_of
from wan_jax.config import TransformerConfig
from wan_jax.guidance import TextBatch
from wan_jax.lora import LoRAConfig
from wan_jax.schedule import flow_sigmas
from wan_jax.sde import SDEConfig
from wan_jax.transformer import REMAT_POLICIES, WanTransformer3D

SIZES = {
    "1.3b": dict(num_attention_heads=12, ffn_dim=8960, num_layers=30),
    "14b": dict(num_attention_heads=40, ffn_dim=13824, num_layers=40),
    "tiny": dict(num_attention_heads=2, ffn_dim=512, num_layers=2),
}
TEXT, TEXT_ROWS = 64, 512


def forward_flops(c: TransformerConfig, tokens: int) -> float:
    """Matrix-product FLOPs of one video's forward pass, the padded text rows counted once."""
    d = c.num_attention_heads * c.attention_head_dim
    block = tokens * (6 * 2 * d * d + 2 * 2 * d * c.ffn_dim) + 4 * tokens**2 * d  # q k v o, cross q o, FFN; self
    block += (TEXT + 1) * 2 * 2 * d * d + 4 * tokens * (TEXT + 1) * d  # cross k v; cross attention
    return c.num_layers * block


def timed(function, repeats: int) -> float:
    """Median seconds of a call that returns arrays, after one warm-up call."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(function())
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def main(_):
    f = flags.FLAGS
    config = TransformerConfig(**SIZES[f.size], attention_head_dim=128, text_dim=4096)
    mesh, dtype = mesh_lib.make_mesh(devices=jax.devices()[:1]), jnp.dtype(f.dtype)
    device = mesh.devices.flat[0]
    backend = choose_backend("auto", platform_of(device), dtype, config.attention_head_dim)
    draw = jax.jit(lambda: nnx.split(WanTransformer3D(config, dtype=dtype, attention=backend, rngs=nnx.Rngs(0)))[1])
    frozen = draw()
    policy, trainable = make_policy(config, frozen, mesh, lora=LoRAConfig(), key=jax.random.key(0), dtype=dtype,
                                    attention=backend, remat=f.remat)
    steps = StepTable.make(flow_sigmas(20, 3.0), SDEConfig("flow_grpo_wan"))
    step = make_step(policy, steps, f.guidance)
    optimiser = OptimiserConfig()
    update = make_update(policy, steps, f.guidance, LossConfig(kl_beta=f.kl), optimiser)
    shape = ((f.frames - 1) // 4 + 1, f.height // 8, f.width // 8, 16)
    text = TextBatch(jax.random.normal(jax.random.key(1), (f.batch, TEXT, 4096)),
                     jax.random.normal(jax.random.key(2), (TEXT, 4096)), TEXT_ROWS - TEXT)
    flops = f.batch * forward_flops(config, shape[0] * shape[1] * shape[2] // 4) * (2 if f.guidance > 1 else 1)
    parameters = sum(x.size for x in jax.tree.leaves(frozen))
    print(f"{f.size}: {parameters:,} parameters {dtype.name}, {f.batch} x {f.frames} x {f.height} x {f.width}, "
          f"guidance {f.guidance}, attention {backend}, remat {f.remat}, {device.device_kind}, jax {jax.__version__}",
          flush=True)

    def show(name, seconds, work):
        peak = (device.memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**30
        print(f"{name}: {1000 * seconds:.1f} ms, {work / seconds / 1e12:.0f} TFLOP/s (model), peak memory so far "
              f"{peak:.1f} GiB", flush=True)

    samples = jnp.arange(f.batch, dtype=jnp.int32)
    x = jax.random.normal(jax.random.key(3), (f.batch, *shape))
    key = jax.random.key(4)
    show("rollout step", timed(lambda: step(trainable, frozen, x, 3, True, text, key, samples), f.repeats), flops)
    window = np.array([2, 17])
    _, kept = rollout(step, trainable, frozen, x, text, key=key, samples=samples, steps=range(18), window=window)
    advantages = np.random.default_rng(0).standard_normal((1, f.batch))
    batch = stack_batches([kept] * f.micro, np.repeat(advantages, f.micro, 0), np.ones((f.micro, f.batch), bool))
    state, metrics = init_state(trainable, optimiser), None

    def one_update():
        nonlocal state, metrics
        state, metrics, norms = update(state, frozen, batch)
        if one_update.first is None:
            one_update.first = dataclasses.replace(metrics)
        return norms

    one_update.first = None
    seconds = timed(one_update, f.repeats)
    show(f"update of {f.micro} x {len(window)} steps, each", seconds / len(window) / f.micro, 3 * flops)
    first = one_update.first.averages()
    if f.profile:
        kernels.show("rollout step", lambda: step(state.trainable, frozen, x, 3, True, text, key, samples))
        kernels.show("update", one_update)
    print(f"first update's ratio: {first['ratio_min']:.7f} to {first['ratio_max']:.7f}")


if __name__ == "__main__":
    flags.DEFINE_enum("size", "1.3b", list(SIZES), "configuration")
    flags.DEFINE_integer("height", 512, "pixels")
    flags.DEFINE_integer("width", 512, "pixels")
    flags.DEFINE_integer("frames", 1, "pixel frames")
    flags.DEFINE_integer("batch", 9, "videos")
    flags.DEFINE_float("guidance", 1.0, "classifier-free guidance")
    flags.DEFINE_integer("micro", 1, "rollout batches in an update")
    flags.DEFINE_float("kl", 0.0, "weight of the KL to the reference, one more forward pass")
    flags.DEFINE_string("dtype", "bfloat16", "of weights and matrix products")
    flags.DEFINE_enum("remat", "block", list(REMAT_POLICIES), "recomputation")
    flags.DEFINE_integer("repeats", 5, "timed calls")
    flags.DEFINE_bool("profile", False, "list the kernels by time")
    app.run(main)

"""Decoding latents to uint8 frames on the host, as training and sampling do: milliseconds and peak memory.

    python -m benchmarks.decode [--height 480 --width 832 --frames 81 --batch 1 --dtype float32 --chunk N] [--json FILE]

Wan 2.1's VAE with random weights drawn on the device; chunks as `pipeline.make_decoder` chooses them, or of --chunk
latent frames. Where XLA's search for the fastest convolutions runs in the same process its scratch memory is part of
the peak: with JAX_COMPILATION_CACHE_DIR set, a second call shows what decoding takes.
"""

import jax
import jax.numpy as jnp
from absl import app, flags
from flax import nnx

from benchmarks import workload
from benchmarks.full_size import peak_bytes, software, timed
from benchmarks.workload import Record, Stage
from wan_jax import model_dir, pipeline
from wan_jax.config import VAEConfig
from wan_jax.presets import VAE_21
from wan_jax.vae import AutoencoderKLWan

TINY = VAEConfig(base_dim=8, num_res_blocks=1, latents_mean=VAE_21.latents_mean, latents_std=VAE_21.latents_std)


def random_vae(size: str, dtype) -> tuple[nnx.GraphDef, nnx.State]:
    config = TINY if size == "tiny" else VAE_21
    graph, _ = model_dir.abstract("vae", config, dtype=dtype)
    return graph, jax.jit(lambda: nnx.split(AutoencoderKLWan(config, dtype=dtype, rngs=nnx.Rngs(0)))[1])()


def measure(f) -> Record:
    graph, state = random_vae(f.size, jnp.dtype(f.dtype))
    decode = pipeline.make_decoder(graph, chunk=f.chunk)
    x = jax.random.normal(jax.random.key(0), (f.batch, *workload.latent_shape(f.frames, f.height, f.width)))
    stage = Stage.of(timed(lambda: decode(state, x), f.repeats), peak_bytes())
    print(f"decode {f.batch} x {f.frames} x {f.height} x {f.width}, {f.dtype}, {jax.devices()[0].device_kind}: {stage}")
    return Record(f"ours {f.dtype}", {"decode": stage}, jax.devices()[0].device_kind, software())


def main(_):
    measure(flags.FLAGS).write(flags.FLAGS.json)


if __name__ == "__main__":
    workload.define_flags(guidance=1.0, kl=0.0)
    flags.DEFINE_string("dtype", "float32", "of weights and convolutions; training decodes in float32")
    flags.DEFINE_integer("chunk", None, "latent frames at a time, 0 for whole clips; None: as training chooses")
    app.run(main)

"""Decoding latents to uint8 frames on the host, as training and sampling do: milliseconds and peak
memory.

    python -m benchmarks.decode [--height 480 --width 832 --frames 81 --batch 1 --dtype float32
    --chunk N] [--json FILE]

Wan 2.1's VAE with random weights drawn on the device; chunks as `pipeline.make_decoder` chooses
them, or of --chunk latent frames. Where XLA's search for the fastest convolutions runs in the same
process its scratch memory is part of the peak: with JAX_COMPILATION_CACHE_DIR set, a second call
shows what decoding takes.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import nnx

from benchmarks import workload
from benchmarks.full_size import peak_bytes, software, timed
from benchmarks.workload import Record, Stage
from wan_jax.inference import pipeline
from wan_jax.models import flat_params
from wan_jax.models.config import VAEConfig
from wan_jax.models.presets import VAE_21
from wan_jax.storage import model_dir

TINY = VAEConfig(
    base_dim=8, num_res_blocks=1, latents_mean=VAE_21.latents_mean, latents_std=VAE_21.latents_std
)


def random_vae(size: str, dtype) -> tuple[nnx.GraphDef, nnx.State]:
    """Weights drawn on the host, which compiles nothing: kernels that keep the variance, scales 1,
    biases 0.
    """
    graph, like = model_dir.abstract("vae", TINY if size == "tiny" else VAE_21, dtype=dtype)
    rng = np.random.default_rng(0)

    def draw(path: str, x: jax.ShapeDtypeStruct) -> jax.Array:
        if path.endswith("kernel"):
            value = rng.standard_normal(x.shape, np.float32) * math.prod(x.shape[:-1]) ** -0.5
        else:
            value = np.full(x.shape, float(path.endswith("scale")))
        return jnp.asarray(value, x.dtype)

    return graph, flat_params.unflatten(
        like, {path: draw(path, x) for path, x in flat_params.flatten(like).items()}
    )


def measure(f) -> Record:
    graph, state = random_vae(f.size, jnp.dtype(f.dtype))
    decode = pipeline.make_decoder(graph, chunk=f.chunk)
    x = jax.random.normal(
        jax.random.key(0), (f.batch, *workload.latent_shape(f.frames, f.height, f.width))
    )
    stage = Stage.of(timed(lambda: decode(state, x)(), f.repeats), peak_bytes())
    print(
        f"decode {f.batch} x {f.frames} x {f.height} x {f.width}, {f.dtype}, "
        f"{jax.devices()[0].device_kind}: {stage}"
    )
    return Record(f"ours {f.dtype}", {"decode": stage}, jax.devices()[0].device_kind, software())


def main(_):
    measure(flags.FLAGS).write(flags.FLAGS.json)


if __name__ == "__main__":
    workload.define_flags(guidance=1.0, kl=0.0)
    flags.DEFINE_string(
        "dtype", "float32", "of weights and convolutions; training decodes in float32"
    )
    flags.DEFINE_integer(
        "chunk", None, "latent frames at a time, 0 for whole clips; None: as training chooses"
    )
    app.run(main)

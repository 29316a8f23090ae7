"""Measures milliseconds and peak memory of decoding latents to uint8 frames on the host.

    python -m benchmarks.decode --height 480 --width 832 --frames 81 --batch 1
    python -m benchmarks.decode --dtype bfloat16 --chunk 4 --json FILE

The decoder is the one of training and sampling: Wan 2.1's VAE with random weights, in chunks as
`pipeline.make_decoder` chooses them or of `--chunk` latent frames. The peak contains the scratch
memory of XLA's search for the fastest convolutions if that runs in the same process. With
JAX_COMPILATION_CACHE_DIR set, a second call shows what decoding alone takes.
"""

import dataclasses
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

# that of assets/tiny-wan, where normalisation does not matter for time
SMALL = dataclasses.replace(TINY, base_dim=24)
CONFIGS = {"tiny": TINY, "small": SMALL}


def random_vae(size: str, dtype) -> tuple[nnx.GraphDef, nnx.State]:
    """Return a VAE with random weights: kernels that preserve the variance, scales 1, biases 0.

    The weights are drawn on the host, so that nothing is compiled for them.
    """
    graph, like = model_dir.abstract("vae", CONFIGS.get(size, VAE_21), dtype=dtype)
    rng = np.random.default_rng(0)

    def draw(path: str, shape: tuple[int, ...]) -> np.ndarray:
        if path.endswith("kernel"):
            return rng.standard_normal(shape, np.float32) * math.prod(shape[:-1]) ** -0.5
        return np.full(shape, float(path.endswith("scale")))

    weights = {
        path: jnp.asarray(draw(path, leaf.shape), leaf.dtype)
        for path, leaf in flat_params.flatten(like).items()
    }
    return graph, flat_params.unflatten(like, weights)


def measure(settings) -> Record:
    """Return the figures of decoding. settings: the flags."""
    graph, state = random_vae(settings.size, jnp.dtype(settings.dtype))
    decode = pipeline.make_decoder(graph, chunk=settings.chunk)
    latents = jax.random.normal(
        jax.random.key(0), (settings.batch, *workload.shape_of_latents(settings))
    )
    stage = Stage.of(timed(lambda: decode(state, latents)(), settings.repeats), peak_bytes())
    device = jax.devices()[0].device_kind
    print(f"decode {workload.describe_shape(settings)}, {settings.dtype}, {device}: {stage}")
    return Record(f"ours {settings.dtype}", {"decode": stage}, device, software())


def main(_):
    measure(flags.FLAGS).write(flags.FLAGS.json)


if __name__ == "__main__":
    workload.define_flags(guidance=1.0, kl=0.0)
    flags.DEFINE_string(
        "dtype", "float32", "data type of weights and convolutions; training decodes in float32"
    )
    flags.DEFINE_integer(
        "chunk", None, "latent frames decoded at a time, 0 for whole videos; None: as training does"
    )
    app.run(main)

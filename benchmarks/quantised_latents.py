"""What quantised base weights change in a sampled picture, at the true width, a JSON line for each kind.

    python -m benchmarks.quantised_latents --size=1.3b

The same random weights are stored in each kind of `model.weights`, and the same noise is denoised by
Euler steps without guidance. Errors are relative, in the Euclidean norm: of the first velocity and of
the final latents against those with bfloat16 weights, beside which bfloat16 itself stands against
float32. Products of fp8 are those in 8 bits, also on a device that computes them in another type.

Random weights have no outliers, which published ones have: this shows the arithmetic, not what a
published model loses.
"""

import dataclasses
import json
from collections.abc import Callable

import jax
import jax.numpy as jnp
from absl import app, flags
from flax import nnx

from benchmarks import attention, workload
from wan_jax.choices import WEIGHTS
from wan_jax.diffusion.schedule import flow_sigmas
from wan_jax.diffusion.solvers import euler_step
from wan_jax.models.attention import choose_backend, platform_of
from wan_jax.models.quantised import Quantisation
from wan_jax.models.transformer import WanTransformer3D


def draw_inputs(config, shape: tuple[int, ...], videos: int) -> tuple[jax.Array, jax.Array]:
    """Return noise [B,F,H,W,C] and text rows [B,TEXT,text_dim], fp32."""
    keys = jax.random.split(jax.random.key(1))
    noise = jax.random.normal(keys[0], (videos, *shape))
    return noise, jax.random.normal(keys[1], (videos, workload.TEXT, config.text_dim))


def sample(
    size: str, dtype, how: Quantisation | None, inputs, steps: int
) -> tuple[jax.Array, jax.Array]:
    """Return (velocity at the first step, final latents), fp32 [B,F,H,W,C]."""
    config = workload.transformer_config(size)
    backend = choose_backend(
        "auto", platform_of(jax.devices()[0]), dtype, config.attention_head_dim
    )

    def draw():
        return WanTransformer3D(
            config, dtype=dtype, attention=backend, quantisation=how, rngs=nnx.Rngs(0)
        )

    graph, state = nnx.split(nnx.jit(draw)())
    noise, text = inputs

    @jax.jit
    def velocity(state, x, timestep):
        model = nnx.merge(graph, state)
        times = jnp.full(len(x), timestep, jnp.float32)
        padding = workload.TEXT_ROWS - text.shape[1]
        return model(x, times, text.astype(dtype), text_padding=padding).astype(jnp.float32)

    schedule = flow_sigmas(steps, workload.SHIFT)
    x, first = noise, None
    for step in range(steps):
        v = velocity(state, x, float(schedule.timesteps[step]))
        first = v if first is None else first
        x = euler_step(x, v, *schedule.sigmas[step : step + 2])
    assert first is not None
    return first, x


def compare(size: str, inputs, steps: int, line: Callable[[dict], None]) -> None:
    """Report the errors of each kind. line: prints a record."""
    base = sample(size, jnp.bfloat16, None, inputs, steps)

    def report(name: str, found, wanted):
        errors = {
            key: float(f"{attention.error(x, y):.3g}")
            for key, x, y in zip(("velocity", "latents"), found, wanted, strict=True)
        }
        line({"size": size, "weights": name, "steps": steps} | errors)

    report("bfloat16 against float32", base, sample(size, jnp.float32, None, inputs, steps))
    device = jax.devices()[0]
    for kind in WEIGHTS[1:]:
        how = Quantisation.choose(kind, platform_of(device), device)
        assert how is not None
        how = dataclasses.replace(how, native=kind == "fp8")
        report(kind, sample(size, jnp.bfloat16, how, inputs, steps), base)


def main(_):
    settings = flags.FLAGS
    about = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    shape = workload.shape_of_latents(settings)
    inputs = draw_inputs(workload.transformer_config(settings.size), shape, settings.batch)
    compare(
        settings.size,
        inputs,
        settings.steps,
        lambda record: print(json.dumps(record | about), flush=True),
    )


if __name__ == "__main__":
    flags.DEFINE_enum("size", "1.3b", list(workload.SIZES), "size of the transformer")
    flags.DEFINE_integer("height", 128, "height in pixels", lower_bound=16)
    flags.DEFINE_integer("width", 128, "width in pixels", lower_bound=16)
    flags.DEFINE_integer("frames", 1, "frames of a video", lower_bound=1)
    flags.DEFINE_integer("batch", 1, "videos", lower_bound=1)
    flags.DEFINE_integer("steps", 10, "denoising steps", lower_bound=1)
    app.run(main)

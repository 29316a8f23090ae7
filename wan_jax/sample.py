"""Samples a video or a picture from a converted model, or from a checkpoint of a training run.

    python -m wan_jax.sample --model models/tiny-wan --prompt 'A red sign with the word "open".' --out open.png
    python -m wan_jax.sample --model models/tiny-wan --checkpoint runs/tiny_ocr --prompt '...' --out open.mp4
"""

import functools
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from wan_jax import cli, experts, media, memory, model_dir, pipeline, reward_head
from wan_jax import mesh as mesh_lib
from wan_jax.attention import choose_backend, platform_of
from wan_jax.cli import UserError
from wan_jax.solvers import SOLVERS, make_solver
from wan_jax.trained import load_transformers

flags.DEFINE_string("model", None, "folder written by convert.from_diffusers", required=True)
flags.DEFINE_string("checkpoint", None, "run folder of grpo.train, or one of its checkpoints/<epoch>; None: the base")
flags.DEFINE_multi_string("prompt", None, "what to show; repeat the flag for several", required=True)
flags.DEFINE_string("negative_prompt", "", "what to steer away from, with guidance above 1")
flags.DEFINE_string("out", None, "file to write: .png, .mp4 or .gif; with several prompts or samples a number is added",
                    required=True)
flags.DEFINE_integer("frames", 1, "pixel frames, 1 + 4k")
flags.DEFINE_integer("height", 480, "pixels, a multiple of 16")
flags.DEFINE_integer("width", 832, "pixels, a multiple of 16")
flags.DEFINE_integer("steps", 50, "denoising steps")
flags.DEFINE_float("guidance", 5.0, "classifier-free guidance; up to 1 means none")
flags.DEFINE_float("guidance_2", None, "of the second expert (Wan 2.2 A14B); None: as the first")
flags.DEFINE_string("reward_head", None, "file of grpo.reward_head: guidance towards a higher reward (Flow-NRG)")
flags.DEFINE_float("reward_guidance", 10.0, "its weight", lower_bound=0.0)
flags.DEFINE_float("shift", None, "shift of the sigma schedule; None: the model's own")
flags.DEFINE_enum("solver", "auto", ["auto", *SOLVERS], "ODE solver; auto: the one of the model's scheduler")
flags.DEFINE_integer("seed", 0, "seed of the initial noise")
flags.DEFINE_integer("samples", 1, "samples a prompt")
flags.DEFINE_integer("fps", 16, "frames a second of a video")
flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "weights and matrix products of the transformer")
flags.DEFINE_enum("offload", "auto", experts.OFFLOAD, "keep the idle expert of two in host memory")
flags.DEFINE_string("attention", "auto", "backend: auto, xla, chunked, cudnn or pallas")
flags.DEFINE_string("noise", None, ".npy file with the initial noise [B, F, H, W, C], in place of the seed's")
FLAGS = flags.FLAGS


def main(_):
    cli.keep_compiled_programs()
    with cli.user_input():
        suffix = pathlib.Path(FLAGS.out).suffix
        media.check_suffix(FLAGS.out, FLAGS.frames)
        dtype = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}[FLAGS.dtype]
        model = model_dir.open_model(FLAGS.model)
        config = model.config("transformer")
        shape = pipeline.latent_shape(FLAGS.frames, FLAGS.height, FLAGS.width, model.config("vae"), config)
        scheduler = model.scheduler
        shift = scheduler.shift if FLAGS.shift is None else FLAGS.shift
        solver = make_solver(scheduler.solver if FLAGS.solver == "auto" else FLAGS.solver, FLAGS.steps, shift,
                             order=scheduler.order)
        steer = reward_head.guidance(FLAGS.reward_head, FLAGS.reward_guidance, config, model)
        mesh = mesh_lib.make_mesh(devices=jax.devices()[:1])
        backend = choose_backend(FLAGS.attention, platform_of(jax.devices()[0]), dtype, config.attention_head_dim)

    table = pipeline.embed_prompts(model, FLAGS.prompt, FLAGS.negative_prompt, dtype=dtype)
    graphdef, weights = load_transformers(model, FLAGS.checkpoint, dtype, backend, mesh, FLAGS.offload)
    vae_graph, vae_state = pipeline.load_vae(model, mesh)
    index = np.repeat(np.arange(len(FLAGS.prompt)), FLAGS.samples)
    keys = jax.random.split(jax.random.key(FLAGS.seed), len(index))
    noise = jax.vmap(lambda k: jax.random.normal(k, shape, jnp.float32))(keys)
    if FLAGS.noise:
        noise = jnp.asarray(np.load(FLAGS.noise), jnp.float32)
        if noise.shape != (len(index), *shape):
            raise UserError(f"--noise {FLAGS.noise} has shape {noise.shape}, these flags need {(len(index), *shape)}")

    start = time.monotonic()
    scales = experts.guidances(FLAGS.guidance, FLAGS.guidance_2, len(model.experts))
    steps = experts.per_guidance(functools.partial(
        pipeline.make_ode_step, lambda state: nnx.merge(graphdef, state), solver, shift=steer), scales)
    parts = experts.segments(solver.schedule.timesteps, model.boundary)
    text = table.batch(index, mesh_lib.replicated(mesh), mesh_lib.replicated(mesh))
    latents, = pipeline.sample_ode(steps, lambda i: (weights(i),), parts, solver, [(noise, text)])
    videos = pipeline.make_decoder(vae_graph)(vae_state, latents)()
    broken = np.flatnonzero(~videos.finite)  # not written: they would be black
    out = pathlib.Path(FLAGS.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    for i in np.flatnonzero(videos.finite):
        path = out if len(videos) == 1 else out.with_name(f"{out.stem}_{i:03d}{suffix}")
        media.write(path, videos.frames[i], FLAGS.fps)
        print(f"{path}  {FLAGS.prompt[index[i]]}")
    print(f"{len(videos) - len(broken)} sample(s) of {FLAGS.frames} x {FLAGS.height} x {FLAGS.width} in "
          f"{time.monotonic() - start:.1f} s, compilation included; {memory.peaks()}")
    if len(broken):
        of = ", ".join(repr(FLAGS.prompt[p]) for p in dict.fromkeys(index[broken]))
        raise UserError(f"{len(broken)} of {len(videos)} samples are not finite numbers (NaN or infinite) and were not "
                        f"written, of the prompt {of}. {pipeline.NOT_FINITE}")


if __name__ == "__main__":
    cli.run(main)

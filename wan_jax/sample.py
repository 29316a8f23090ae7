"""Samples videos or pictures from a converted model, or from a checkpoint of a training run.

    python -m wan_jax.sample --model models/tiny-wan \
        --prompt 'A red sign with the word "open".' --out open.png
    python -m wan_jax.sample --model models/tiny-wan --checkpoint runs/tiny_ocr \
        --prompt '...' --out open.mp4 --frames 33
"""

import functools
import os
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from wan_jax.choices import BACKENDS, DTYPES, OFFLOAD, SOLVERS
from wan_jax.command_line import cli
from wan_jax.command_line.flag_types import check_used, define_number, define_path
from wan_jax.command_line.limits import SEED, Range
from wan_jax.diffusion import experts
from wan_jax.diffusion.solvers import make_solver
from wan_jax.distributed import memory
from wan_jax.distributed import mesh as mesh_lib
from wan_jax.distributed.sharding import replicated
from wan_jax.errors import UserError
from wan_jax.inference import pipeline, reward_guidance
from wan_jax.models.attention import choose_backend, platform_of
from wan_jax.storage import media, merged_loras, model_dir
from wan_jax.storage.trained_weights import load_transformers

define_path("model", "folder written by convert.from_diffusers", required=True)
define_path(
    "checkpoint",
    "run folder of grpo.train, or one of its checkpoints/<epoch>; not given: the base model",
)
flags.DEFINE_multi_string(
    "lora",
    None,
    "LoRA file to merge, FILE[:SCALE], for two experts HIGH,LOW[:SCALE]; repeat the flag for "
    "several. Those that a checkpoint's base had are merged anyway; the flag says where such a file "
    "is now",
)
flags.DEFINE_multi_string(
    "prompt", None, "what to show; repeat the flag for several prompts", required=True
)
flags.DEFINE_string("negative_prompt", "", "what to steer away from, with guidance above 1")
define_path(
    "out",
    "file to write: .png, .mp4 or .gif; with several prompts or samples a number is added",
    required=True,
)
define_number("frames", 1, "pixel frames, 1 + 4k", Range(1), int)
define_number("height", 480, "pixels, a multiple of 16", Range(1), int)
define_number("width", 832, "pixels, a multiple of 16", Range(1), int)
define_number("steps", 50, "denoising steps", Range(1), int)
define_number("guidance", 5.0, "classifier-free guidance; up to 1 means none", Range(0))
define_number(
    "guidance_2",
    None,
    "guidance of the second expert (Wan 2.2 A14B); not given: --guidance",
    Range(0),
)
define_path("reward_head", "file of grpo.reward_head: guidance towards a higher reward (Flow-NRG)")
define_number("reward_guidance", 10.0, "weight of the reward head", Range(0))
define_number(
    "shift",
    None,
    "shift of the sigma schedule; not given: the model's own",
    Range(0, above=True),
)
flags.DEFINE_enum(
    "solver", "auto", ["auto", *SOLVERS], "ODE solver; auto: the one of the model's scheduler"
)
define_number("seed", 0, "seed of the initial noise", SEED, int)
define_number("samples", 1, "samples per prompt", Range(1), int)
define_number("fps", 16.0, "frames per second of a video", media.FPS)
flags.DEFINE_enum("dtype", "float32", DTYPES, "weights and matrix products of the transformer")
flags.DEFINE_enum("offload", "auto", OFFLOAD, "keep the idle expert of two in host memory")
flags.DEFINE_string("attention", "auto", f"backend: {', '.join(BACKENDS)}")
define_path("noise", ".npy file with the initial noise [B, F, H, W, C], instead of the seed's")
define_number(
    "tile",
    0,
    "decode in tiles of this many pixels, which overlap by a quarter and are blended: for sizes "
    "that do not fit the device's memory otherwise; an approximation, colours can differ between "
    "tiles; 0: whole frames, exact",
    Range(0),
    int,
)
FLAGS = flags.FLAGS


def main(_):
    cli.enable_compilation_cache()
    # Check every setting before hours of work.
    with cli.user_input():
        media.check_suffix(FLAGS.out, FLAGS.frames)
        if not all(map(str.strip, FLAGS.prompt)):
            raise UserError(
                f"--prompt={min(FLAGS.prompt, key=str.strip)!r} is empty: describe what to show"
            )
        if FLAGS.checkpoint and not os.path.isdir(FLAGS.checkpoint):
            raise UserError(
                f"--checkpoint={FLAGS.checkpoint} does not exist: give a run folder of grpo.train "
                "or one of its checkpoints/<epoch>"
            )
        prompt_of = np.repeat(np.arange(len(FLAGS.prompt)), FLAGS.samples)  # [B]
        outputs = output_files(pathlib.Path(FLAGS.out), len(prompt_of))
        dtype = jnp.dtype(FLAGS.dtype)
        model = merged_loras.merge_with_checkpoint(
            model_dir.open_model(FLAGS.model), FLAGS.checkpoint, FLAGS.lora
        )
        config = model.config("transformer")
        check_used(FLAGS, without_effect(FLAGS, len(model.experts)))
        shape = pipeline.latent_shape(
            FLAGS.frames, FLAGS.height, FLAGS.width, model.config("vae"), config
        )
        tile = tile_cells(FLAGS.tile, model.config("vae").scale_factor_spatial)
        scheduler = model.scheduler
        solver = make_solver(
            scheduler.solver if FLAGS.solver == "auto" else FLAGS.solver,
            FLAGS.steps,
            scheduler.shift if FLAGS.shift is None else FLAGS.shift,
            order=scheduler.order,
        )
        reward_shift = reward_guidance.guidance(
            FLAGS.reward_head, FLAGS.reward_guidance, config, model
        )
        mesh = mesh_lib.make_mesh(devices=jax.devices()[:1])
        backend = choose_backend(
            FLAGS.attention, platform_of(jax.devices()[0]), dtype, config.attention_head_dim
        )
        noise_shape = (len(prompt_of), *shape)
        given_noise = load_noise(FLAGS.noise, noise_shape) if FLAGS.noise else None
        for path in outputs:
            media.check_writable(path, FLAGS.frames, FLAGS.height, FLAGS.width, FLAGS.fps)

    # Load the networks; the text encoder is freed again.
    table = pipeline.embed_prompts(model, FLAGS.prompt, FLAGS.negative_prompt, dtype=dtype)
    graphdef, weights = load_transformers(
        model, FLAGS.checkpoint, dtype, backend, mesh, FLAGS.offload
    )
    vae_graph, vae_state = pipeline.load_vae(model, mesh)

    # Draw the noise of each video from a key of its own.
    keys = jax.random.split(jax.random.key(FLAGS.seed), len(prompt_of))
    noise = (
        jax.vmap(lambda k: jax.random.normal(k, shape, jnp.float32))(keys)
        if given_noise is None
        else jnp.asarray(given_noise)
    )

    # Denoise.
    start = time.monotonic()
    scales = experts.guidances(FLAGS.guidance, FLAGS.guidance_2, len(model.experts))
    steps = experts.per_guidance(
        functools.partial(
            pipeline.make_ode_step,
            lambda state: nnx.merge(graphdef, state),
            solver,
            shift=reward_shift,
        ),
        scales,
    )
    segments = experts.segments(solver.schedule.timesteps, model.boundary)
    text = table.batch(prompt_of, replicated(mesh), replicated(mesh))
    (latents,) = pipeline.sample_ode(
        steps, lambda expert: (weights(expert),), segments, solver, [(noise, text)]
    )

    # Decode, and write the videos without non-finite values; the others would be black.
    decode = pipeline.make_decoder(vae_graph, tile=tile, overlap=tile // 4)
    videos = decode(vae_state, latents)()
    for i in np.flatnonzero(videos.finite):
        media.write(outputs[i], videos.frames[i], FLAGS.fps)
        print(f"{outputs[i]}  {FLAGS.prompt[prompt_of[i]]}")
    broken = np.flatnonzero(~videos.finite)
    print(
        f"{len(videos) - len(broken)} sample(s) of {FLAGS.frames} x {FLAGS.height} x {FLAGS.width} "
        f"in {time.monotonic() - start:.1f} s, compilation included; {memory.peaks()}"
    )
    if len(broken):
        prompts = ", ".join(repr(FLAGS.prompt[p]) for p in dict.fromkeys(prompt_of[broken]))
        raise UserError(
            f"{len(broken)} of {len(videos)} samples are not finite numbers (NaN or infinite) and "
            f"were not written, of the prompt {prompts}. {pipeline.NOT_FINITE}"
        )


def without_effect(values: flags.FlagValues, num_experts: int) -> dict[str, str]:
    """Return the flags that have no effect with the other ones, each with what it needs."""
    guided = values.guidance > 1
    needs = (
        ("reward_guidance", "--reward_head", values.reward_head is not None),
        ("negative_prompt", "--guidance above 1", guided),
        (
            "guidance_2",
            "--guidance above 1 and a model with two experts",
            guided and num_experts > 1,
        ),
        ("seed", "to be without --noise", values.noise is None),
        ("fps", "a video as --out", pathlib.Path(values.out).suffix.lower() != ".png"),
    )
    return {name: needed for name, needed, has_effect in needs if not has_effect}


def output_files(out: pathlib.Path, count: int) -> list[pathlib.Path]:
    """Return the file of each of `count` samples."""
    if count == 1:
        return [out]
    return [out.with_name(f"{out.stem}_{i:03d}{out.suffix}") for i in range(count)]


def tile_cells(pixels: int, cell: int) -> int:
    """Return the side of a tile in latent cells of `cell` pixels; 0 for no tiles.

    Raises `UserError` unless it is a multiple of four cells, so that the overlap is whole.
    """
    if pixels % (4 * cell):
        raise UserError(
            f"--tile={pixels} must be a multiple of {4 * cell} pixels; use "
            f"{max(1, round(pixels / (4 * cell))) * 4 * cell}"
        )
    return pixels // cell


def load_noise(path: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return the array of a .npy file, fp32. Raise `UserError` when it is not one, or of another
    shape.
    """
    try:
        noise = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        raise UserError(f"--noise={path} is not a .npy file with an array of numbers") from None
    if not isinstance(noise, np.ndarray) or noise.shape != shape:
        raise UserError(
            f"--noise={path} has shape {getattr(noise, 'shape', None)}, these flags need {shape}"
        )
    return noise.astype(np.float32)


if __name__ == "__main__":
    cli.run(main)

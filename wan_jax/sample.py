"""Samples videos or pictures from a converted model, or from a checkpoint of a training run.

    python -m wan_jax.sample --model models/tiny-wan \\
        --prompt 'A red sign with the word "open".' --out open.png
    python -m wan_jax.sample --model models/tiny-wan --checkpoint runs/tiny_ocr \\
        --prompts prompts.txt --samples 4 --grid --out signs.png

Steps, guidance, shift and frames per second that are not given are those that the model is
published with; the command prints the values in force and where they come from. docs/howto/sampling.md
has a command for each model.
"""

import dataclasses
import functools
import pathlib
import sys
import time

import numpy as np
from absl import flags
from tqdm import tqdm

from wan_jax.choices import (
    BACKENDS,
    DTYPES,
    MATMUL_PRECISIONS,
    OFFLOAD,
    SCHEDULES,
    SOLVERS,
    TEXT_ENCODER,
    WAN,
    WEIGHTS,
)
from wan_jax.command_line import cli
from wan_jax.command_line.flag_types import check_used, define_number, define_path
from wan_jax.command_line.limits import SAMPLES, SEED, STEPS, Range
from wan_jax.distributed import memory
from wan_jax.errors import UserError
from wan_jax.inference import pipeline, reward_guidance, sampling
from wan_jax.inference.outputs import Outputs
from wan_jax.inference.placement import choose_placement
from wan_jax.inference.prompt_files import read_prompts
from wan_jax.inference.settings import (
    Given,
    SamplingSettings,
    choose_settings,
    negative_prompt,
)
from wan_jax.models import precision
from wan_jax.storage import media, merged_loras, model_dir, trained_weights

define_path("model", "folder written by convert.from_diffusers", required=True)
define_path(
    "checkpoint",
    "RUN, RUN/best or RUN/checkpoints/<epoch> of grpo.train; not given: the base",
)
flags.DEFINE_multi_string(
    "lora",
    None,
    "LoRA file to merge, FILE[:SCALE], for two experts HIGH,LOW[:SCALE]; repeat the flag for "
    "several. Also the present path of a LoRA that a checkpoint's base had",
)
flags.DEFINE_multi_string("prompt", [], "what to show; repeat the flag for several prompts")
define_path("prompts", 'file of prompts: text, one a line, or .jsonl with {"prompt": ...} a line')
flags.DEFINE_string(
    "negative_prompt",
    "",
    f"what to steer away from, with guidance above 1; {WAN}: the one of Wan's own code",
)
define_path(
    "out",
    ".png, .mp4 or .gif to write; a number is added if there are several",
    required=True,
)
flags.DEFINE_bool("grid", False, "also write one file with all: a row for each prompt")
define_number("frames", 1, "pixel frames, 1 + 4k", Range(1), int)
define_number("height", 480, "pixels, a multiple of 16", Range(1), int)
define_number("width", 832, "pixels, a multiple of 16", Range(1), int)
define_number("samples", 1, "samples per prompt", SAMPLES, int)
define_number("seed", 0, "seed of the initial noise", SEED, int)
define_path("noise", ".npy file with the initial noise [B, F, H, W, C], instead of the seed's")

# ---- settings of the sampler: not given, those that the model is published with
define_number("steps", None, "denoising steps", STEPS, int)
define_number("guidance", None, "classifier-free guidance; up to 1 means none", Range(0))
define_number(
    "guidance_2",
    None,
    "guidance of the second expert (Wan 2.2 A14B); not given: --guidance, if given",
    Range(0),
)
define_number("shift", None, "shift of the sigma schedule", Range(0, above=True))
flags.DEFINE_enum(
    "solver", "auto", ["auto", *SOLVERS], "ODE solver; auto: the one of the model's scheduler"
)
flags.DEFINE_enum(
    "schedule",
    None,
    SCHEDULES,
    "timesteps: of Diffusers 0.37 and later, which is the default, or of earlier ones and Wan's code",
)
define_number("fps", None, "frames per second of a video", media.FPS)
define_path("reward_head", "file of grpo.reward_head: guidance towards a higher reward (Flow-NRG)")
define_number("reward_guidance", 10.0, "weight of the reward head", Range(0))

# ---- speed and memory
flags.DEFINE_enum(
    "dtype",
    "auto",
    ["auto", *DTYPES],
    "weights and matrix products of transformer and text encoder; auto: bfloat16, but float32 on "
    "the CPU",
)
flags.DEFINE_enum(
    "weights",
    "dtype",
    WEIGHTS,
    "how the transformer's weights are stored",
)
flags.DEFINE_enum(
    "matmul_precision",
    "auto",
    ["auto", *MATMUL_PRECISIONS],
    "precision of float32 products, also in the VAE; default: the backend's, TF32 on NVIDIA; auto: "
    "float32 if --dtype is float32, else default",
)
define_number("batch_size", 0, "videos sampled at a time; 0: chosen", Range(0), int)
define_number("devices", 0, "number of devices; 0: all of this machine", Range(0), int)
flags.DEFINE_enum(
    "text_encoder",
    "auto",
    TEXT_ENCODER,
    "where it runs; auto: the CPU if the device is too small",
)
flags.DEFINE_enum("offload", "auto", OFFLOAD, "keep the idle expert of two in host memory")
flags.DEFINE_string("attention", "auto", f"backend: {', '.join(BACKENDS)}")
define_number(
    "tile",
    0,
    "decode in blended tiles of this many pixels, for sizes beyond the device's memory; colours "
    "can differ between tiles; 0: whole frames, exact",
    Range(0),
    int,
)
FLAGS = flags.FLAGS


def main(_):
    cli.enable_compilation_cache()

    # ---- 1. check every setting before hours of work -------------------------------------------
    with cli.user_input():
        request = checked_request()
        outputs = Outputs(pathlib.Path(FLAGS.out), request, grid=FLAGS.grid)
        outputs.check_writable()
        note = ""
        if FLAGS.checkpoint is not None:
            note = trained_weights.base_note(FLAGS.checkpoint, request.place.quantisation)
    precision.use(request.place.precision)
    print(describe(request), *([note] if note else []), sep="\n", flush=True)

    # ---- 2. encode the prompts; the text encoder is freed again --------------------------------
    bar = functools.partial(
        tqdm, desc="prompts", leave=False, dynamic_ncols=True, disable=not sys.stderr.isatty()
    )
    table = sampling.encode(request, bar)

    # ---- 3. load the transformers and the VAE --------------------------------------------------
    networks = sampling.load(request)

    # ---- 4. denoise, decode and write, batch by batch ------------------------------------------
    start = time.monotonic()
    for batch in sampling.sample(request, table, networks):
        denoising, decoding = batch.seconds
        print(
            f"batch {batch.number + 1} of {len(request.batches)}: denoised in {denoising:.1f} s, "
            f"decoded in {decoding:.1f} s",
            flush=True,
        )
        outputs.write(batch)
    outputs.write_grid()

    # ---- 5. report; videos with non-finite values would be black and are not written -----------
    count = len(request.prompt_of)
    print(
        f"{count - len(outputs.broken)} sample(s) of {FLAGS.frames} x {FLAGS.height} x "
        f"{FLAGS.width} in {time.monotonic() - start:.1f} s, compilation included; "
        f"{memory.peaks()}"
    )
    if outputs.broken:
        broken = dict.fromkeys(request.prompts[request.prompt_of[i]] for i in outputs.broken)
        raise UserError(
            f"{len(outputs.broken)} of {count} samples are not finite numbers (NaN or infinite) and "
            f"were not written, of the prompt {', '.join(map(repr, broken))}. {pipeline.NOT_FINITE}"
        )


def checked_request(samples: int | None = None) -> sampling.SampleRequest:
    """Return what the flags ask for. samples: of each prompt, instead of --samples. Raises `UserError`
    or ValueError where they contradict each other, the model or the devices.
    """
    count = FLAGS.samples if samples is None else samples
    media.check_suffix(FLAGS.out, FLAGS.frames)
    prompts = checked_prompts()
    single = FLAGS.checkpoint is not None and trained_weights.used_single_expert(FLAGS.checkpoint)
    model = merged_loras.merge_with_checkpoint(
        model_dir.open_model(FLAGS.model, single_expert=single), FLAGS.checkpoint, FLAGS.lora
    )
    config = model.config("transformer")
    solver = None if FLAGS.solver == "auto" else FLAGS.solver
    names = ("steps", "guidance", "guidance_2", "shift", "schedule", "fps")
    given = Given(solver=solver, **{name: FLAGS[name].value for name in names})
    settings = choose_settings(model, FLAGS.height, FLAGS.width, given)
    check_used(FLAGS, without_effect(settings, len(model.experts)))
    settings.make_solver()
    request = sampling.SampleRequest(
        model=model,
        checkpoint=FLAGS.checkpoint,
        prompts=prompts,
        negative=negative_prompt(FLAGS.negative_prompt),
        samples=count,
        frames=FLAGS.frames,
        height=FLAGS.height,
        width=FLAGS.width,
        settings=settings,
        place=choose_placement(
            model,
            len(prompts) * count,
            FLAGS.frames,
            devices=FLAGS.devices,
            batch_size=FLAGS.batch_size,
            dtype=FLAGS.dtype,
            precision=FLAGS.matmul_precision,
            attention=FLAGS.attention,
            weights=FLAGS.weights,
            text_encoder=FLAGS.text_encoder,
        ),
        seed=FLAGS.seed,
        reward_shift=reward_guidance.guidance(
            FLAGS.reward_head, FLAGS.reward_guidance, config, model
        ),
        offload=FLAGS.offload,
        tile=tile_cells(FLAGS.tile, model.config("vae").scale_factor_spatial),
    )
    return with_noise(request, FLAGS.noise)


def checked_prompts() -> tuple[str, ...]:
    """Return the prompts of both flags. Raises `UserError` where there is none, or an empty one."""
    prompts = tuple(FLAGS.prompt) + (read_prompts(FLAGS.prompts) if FLAGS.prompts else ())
    if not prompts:
        raise UserError("--prompt is missing: give it, or a file of prompts with --prompts")
    if not all(map(str.strip, prompts)):
        raise UserError(f"--prompt={min(prompts, key=str.strip)!r} is empty: describe what to show")
    return prompts


def without_effect(settings: SamplingSettings, num_experts: int) -> dict[str, str]:
    """Return the flags that have no effect with the other ones, each with what it needs."""
    needs = (
        ("reward_guidance", "--reward_head", FLAGS.reward_head is not None),
        ("seed", "to be without --noise", FLAGS.noise is None),
        ("fps", "a video as --out", pathlib.Path(FLAGS.out).suffix.lower() != ".png"),
    )
    unused = {name: needed for name, needed, has_effect in needs if not has_effect}
    return unused | settings.unused(num_experts)


def describe(request: sampling.SampleRequest) -> str:
    """Return the values in force and where they come from, as a table."""
    name = request.settings.name
    wan = f"--negative_prompt={WAN} is the one of Wan's own code"
    negative = FLAGS.negative_prompt or "none"
    rows = [
        ("model", str(request.model.path), f"has the networks of {name}" if name else "no preset"),
        *request.settings.rows(),
        ("negative prompt", negative, "" if FLAGS.negative_prompt else wan),
        *request.place.rows(),
    ]
    return "\n".join(f"  {name:16}  {value:18}  {source}".rstrip() for name, value, source in rows)


def with_noise(request: sampling.SampleRequest, path: str | None) -> sampling.SampleRequest:
    """Return the request with the noise of a .npy file, if one is given."""
    if path is None:
        _ = request.shape  # raises on sizes that Wan cannot make
        return request
    noise = load_noise(path, (len(request.prompt_of), *request.shape))
    return dataclasses.replace(request, noise=noise)


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

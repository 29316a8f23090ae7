"""Encodes pictures and videos with their captions, or samples of a model, as data to train on.

    python -m grpo.encode_clips --model models/tiny-wan --src signs --out data/signs \\
        --height 64 --width 128
    python -m grpo.encode_clips --model models/tiny-wan --from_model 256 \\
        --prompts assets/prompts/tiny_train.txt --out data/own --height 64 --width 128 --guidance 2

Captions are in FILE.txt beside each file, or in metadata.jsonl with {"file": ..., "prompt": ...} a
line. Frames are resized until they cover the size, and their middle is kept. The same command encodes
what is new, and goes on after an interruption. `config.data.path` trains on the folder (docs/howto/data.md).
"""

import dataclasses
import pathlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from tqdm import tqdm

from grpo.data.clips import Clip, check_clip, describe_left_out, find_clips, load_frames
from grpo.data.latent_folder import SHARD, Kind, Writer, encoders_digest
from grpo.rollout import initial_noise
from wan_jax.choices import DTYPES, SOLVERS, WAN
from wan_jax.command_line import cli
from wan_jax.command_line.flag_types import check_used, define_number, define_path
from wan_jax.command_line.limits import SEED, STEPS, Range
from wan_jax.errors import UserError
from wan_jax.inference import pipeline, sampling
from wan_jax.inference.encoding import make_video_encoder
from wan_jax.inference.placement import Placement, choose_placement
from wan_jax.inference.prompt_files import read_prompts
from wan_jax.inference.settings import Given, SamplingSettings, choose_settings, negative_prompt
from wan_jax.models import precision
from wan_jax.storage import folder_lock, media, model_dir

Key = tuple[str, str, str]  # of an item: `latent_folder.Item.key`
Encoded = tuple[Key, np.ndarray, np.ndarray]  # key, latents, text of an item
# flags of samples of a model, with what they need
OF_SAMPLES: Mapping[str, str] = dict.fromkeys(
    ["prompts", "negative_prompt", "seed", "steps", "guidance", "guidance_2", "shift", "solver"],
    "--from_model",
)
PICTURES = 16  # of a batch of the VAE, if not given; of videos it is one


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What to encode.

    Attributes:
        model: folder of the model.
        out: folder to write.
        src: folder of pictures and videos; None: samples of the model.
        samples: number of samples of the model; 0: files.
        prompts: file of prompts of the samples.
        negative: negative prompt of the samples.
        seed: of the samples.
        frames, height, width: of the videos.
        dtype: 'auto' or one of `DTYPES`.
        batch_size: videos at a time; 0: chosen.
        given: settings of the sampler, and the frame rate of videos in files.
    """

    model: str
    out: str
    src: str | None = None
    samples: int = 0
    prompts: str | None = None
    negative: str = ""
    seed: int = 0
    frames: int = 1
    height: int = 480
    width: int = 832
    dtype: str = "auto"
    batch_size: int = 0
    given: Given = dataclasses.field(default_factory=Given)


@dataclasses.dataclass(frozen=True)
class NumberedRequest(sampling.SampleRequest):
    """A request whose samples have numbers, int32 [N]: the noise of a sample depends only on the seed
    and its number, not on which others are made with it.
    """

    numbers: np.ndarray = dataclasses.field(default_factory=lambda: np.arange(0, dtype=np.int32))

    def initial_noise(self, rows: np.ndarray) -> jax.Array:
        return initial_noise(jax.random.key(self.seed), self.numbers[rows], self.shape)


def main(_):
    args = flags.FLAGS
    without_effect = {"fps": "--src"} if args.from_model else OF_SAMPLES
    check_used(args, without_effect)
    cli.enable_compilation_cache()
    names = ("steps", "guidance", "guidance_2", "shift", "fps")
    solver = None if args.solver == "auto" else args.solver
    encode(
        Wanted(
            model=args.model,
            out=args.out,
            src=args.src,
            samples=args.from_model,
            prompts=args.prompts,
            negative=negative_prompt(args.negative_prompt),
            seed=args.seed,
            frames=args.frames,
            height=args.height,
            width=args.width,
            dtype=args.dtype,
            batch_size=args.batch_size,
            given=Given(solver=solver, **{name: args[name].value for name in names}),
        )
    )


def encode(wanted: Wanted) -> None:
    """Encode what the folder `out` does not have. Raises `UserError`."""
    # ---- 1. check everything before hours of work ---------------------------------------------
    if jax.process_count() > 1:
        raise UserError("grpo.encode_clips runs in one process")
    if (wanted.src is None) == (not wanted.samples):
        raise UserError(
            f"--src={wanted.src} and --from_model={wanted.samples}: give either --src, a folder of "
            "pictures and videos, or --from_model, a number of samples"
        )
    with cli.user_input():
        model = model_dir.open_model(wanted.model)
        pipeline.latent_shape(
            wanted.frames,
            wanted.height,
            wanted.width,
            model.config("vae"),
            model.config("transformer"),
        )  # raises where the model cannot make it
        settings = choose_settings(model, wanted.height, wanted.width, wanted.given)
        settings.make_solver()
        place = choose_placement(
            model,
            max(wanted.samples, 1),
            wanted.frames,
            batch_size=wanted.batch_size if wanted.samples else 1,
            dtype=wanted.dtype,
        )
    precision.use(place.precision)
    clips: dict[Key, Clip] = {}
    if wanted.src is not None:
        found = find_clips(pathlib.Path(wanted.src))
        if note := describe_left_out(pathlib.Path(wanted.src), found):
            print(note, flush=True)
        clips = {(clip.name, clip.digest(), clip.prompt): clip for clip in found}
        keys = [*clips]
    else:
        keys = sample_keys(wanted)

    with folder_lock.locked(wanted.out, "--out"):
        # ---- 2. what is missing ---------------------------------------------------------------
        writer = Writer(wanted.out, kind_of(wanted, model, settings, place))
        missing = [key for key in keys if key not in writer.items]
        print(f"{len(missing)} of {len(keys)} to encode", flush=True)

        # ---- 3. encode, shard by shard --------------------------------------------------------
        if missing:
            if clips:
                chosen = {key: clips[key] for key in missing}
                encoded = encode_files(wanted, chosen, model, place, settings)
            else:
                encoded = sample_data(wanted, missing, model, place, settings)
            hidden = not sys.stderr.isatty()
            write_shards(
                writer, tqdm(encoded, "encoding", len(missing), leave=False, disable=hidden)
            )

        # ---- 4. the items that are in the source now, in its order ----------------------------
        dropped = len(writer.items) - len(keys)
        writer.write(keys)
        print(
            f"{wanted.out}: {len(keys)} items of {wanted.frames} x {wanted.height} x {wanted.width}"
            + (f"; {dropped} that are not in the source any more were dropped" if dropped else "")
        )


def kind_of(
    wanted: Wanted, model: model_dir.ModelDir, settings: SamplingSettings, place: Placement
) -> Kind:
    """Return what all items of this command share."""
    source = "files"
    if wanted.samples:
        values = {name: value for name, value, _ in settings.rows() if name != "fps"}
        values |= {"seed": str(wanted.seed), "negative": wanted.negative}
        values["model"] = str(model.fingerprint)[:12]
        source = "samples, " + ", ".join(f"{name} {value}" for name, value in values.items())
    return Kind(
        encoders=encoders_digest(model),
        height=wanted.height,
        width=wanted.width,
        frames=wanted.frames,
        fps=settings.fps if wanted.frames > 1 and not wanted.samples else None,
        dtype=place.dtype,
        source=source,
    )


def sample_keys(wanted: Wanted) -> list[Key]:
    """Return the keys of the samples, of each prompt of the file in turn. Raises `UserError`."""
    if wanted.prompts is None:
        raise UserError(f"--from_model={wanted.samples} needs a file of prompts: give --prompts")
    prompts = read_prompts(wanted.prompts)
    return [(f"sample_{i:06d}", "", prompts[i % len(prompts)]) for i in range(wanted.samples)]


def encode_files(
    wanted: Wanted,
    clips: Mapping[Key, Clip],
    model: model_dir.ModelDir,
    place: Placement,
    settings: SamplingSettings,
) -> Iterator[Encoded]:
    """Yield the pictures or videos of files, encoded one batch after the other on one device.

    clips: by the key of their item.
    """
    for clip in clips.values():
        check_clip(clip, wanted.frames, settings.fps)
    table = pipeline.embed_prompts(
        model,
        [prompt for _, _, prompt in clips],
        dtype=jnp.dtype(place.dtype),
        cache=True,
        device=place.encoder_device,
    )
    device = place.mesh.devices.flat[0]
    graph, state = model_dir.build("vae", model, dtype=jnp.float32, device=device)
    run = make_video_encoder(graph, model.config("vae"))
    size = min(wanted.batch_size or (PICTURES if wanted.frames == 1 else 1), len(clips))
    items = [*clips.items()]
    for first in range(0, len(items), size):
        batch = items[first : first + size]
        shape = wanted.frames, wanted.height, wanted.width
        videos = np.stack([load_frames(clip, *shape, settings.fps) for _, clip in batch])
        # the last batch repeats its videos, so that one shape is compiled
        latents = run(state, np.resize(videos, (size, *videos.shape[1:])))
        for row, (key, _) in enumerate(batch):
            check_finite(latents[row], key[0])
            yield key, latents[row], table.prompts[first + row]


def sample_data(
    wanted: Wanted,
    keys: Sequence[Key],
    model: model_dir.ModelDir,
    place: Placement,
    settings: SamplingSettings,
) -> Iterator[Encoded]:
    """Yield samples of the model itself, with guidance. keys: of the samples."""
    request = NumberedRequest(
        model=model,
        checkpoint=None,
        prompts=tuple(prompt for _, _, prompt in keys),
        negative=wanted.negative,
        samples=1,
        frames=wanted.frames,
        height=wanted.height,
        width=wanted.width,
        settings=settings,
        place=place,
        seed=wanted.seed,
        numbers=np.array([int(name.rpartition("_")[2]) for name, _, _ in keys], np.int32),
    )
    table = sampling.encode(request)
    networks = sampling.load(request)
    for rows, latents, _ in sampling.denoise(request, table, networks):
        for row, values in zip(rows, np.asarray(latents)):  # the last batch has further ones
            check_finite(values, keys[row][0])
            yield keys[row], values, table.prompts[row]


def check_finite(latents: np.ndarray, name: str) -> None:
    """Raise `UserError` where latents have a NaN or an infinity."""
    if not np.isfinite(latents).all():
        raise UserError(f"{name}: its latents are not finite. {pipeline.NOT_FINITE}")


def write_shards(writer: Writer, encoded: Iterable[Encoded]) -> None:
    """Write items as they come, `SHARD` at a time."""
    waiting: list[Encoded] = []
    for item in encoded:
        waiting.append(item)
        if len(waiting) == SHARD:
            writer.add(*zip(*waiting))
            waiting = []
    if waiting:
        writer.add(*zip(*waiting))


if __name__ == "__main__":
    define_path("model", "folder written by convert.from_diffusers", required=True)
    define_path("src", "folder of pictures and videos (png, jpg, webp, mp4, gif) with captions")
    define_path("out", "folder to write; one that exists is continued", required=True)
    define_number("frames", 1, "frames of each video, 1 + 4k", Range(1), int)
    define_number("height", 480, "pixels, a multiple of 16 (TI2V-5B: of 32)", Range(1), int)
    define_number("width", 832, "pixels, a multiple of 16 (TI2V-5B: of 32)", Range(1), int)
    define_number(
        "fps", None, "frames a second taken of videos; not given: those of the model", media.FPS
    )
    flags.DEFINE_enum(
        "dtype",
        "auto",
        ["auto", *DTYPES],
        "type of the text encoder, and with --from_model of the transformer; the VAE has float32; auto: "
        "bfloat16, but float32 on the CPU",
    )
    define_number("batch_size", 0, "videos at a time; 0: chosen", Range(0), int)

    # ---- samples of the model instead of files; not given: as the model is published
    define_number(
        "from_model",
        0,
        "number of samples of the model itself, instead of --src",
        Range(0, 1_000_000),
        int,
    )
    define_path(
        "prompts", 'file of prompts: text, one a line, or .jsonl with {"prompt": ...} a line'
    )
    flags.DEFINE_string(
        "negative_prompt", "", f"what to steer away from; {WAN}: the one of Wan's own code"
    )
    define_number("seed", 0, "seed of the samples", SEED, int)
    define_number("steps", None, "denoising steps", STEPS, int)
    define_number("guidance", None, "classifier-free guidance; up to 1 means none", Range(0))
    define_number("guidance_2", None, "guidance of the second expert (Wan 2.2 A14B)", Range(0))
    define_number("shift", None, "shift of the sigma schedule", Range(0, above=True))
    flags.DEFINE_enum(
        "solver", "auto", ["auto", *SOLVERS], "ODE solver; auto: the one of the model's scheduler"
    )
    cli.run(main)

"""Sampling from Python: `wan_jax.load(folder).sample(prompts)` (docs/reference/python.md).

`wan_jax` has these names as attributes, which import this module, and with it JAX, when they are
first used.
"""

import dataclasses
import difflib
import math
import os
import pathlib
import warnings
from collections.abc import Sequence
from typing import Any, TypedDict, Unpack, get_type_hints

import numpy as np

from wan_jax.choices import (
    DTYPES,
    MATMUL_PRECISIONS,
    OFFLOAD,
    SCHEDULES,
    SOLVERS,
    TEXT_ENCODER,
    WEIGHTS,
)
from wan_jax.command_line import cli
from wan_jax.command_line.limits import SAMPLES, SEED, STEPS, Range
from wan_jax.errors import UserError
from wan_jax.inference import pipeline, sampling
from wan_jax.inference.placement import choose_placement
from wan_jax.inference.settings import Given, choose_settings, negative_prompt
from wan_jax.models import precision
from wan_jax.storage import media, merged_loras, model_dir, trained_weights

# the ranges and choices of the flags of `wan_jax.sample`, which a test compares with them
RANGES = {
    **dict.fromkeys(("frames", "height", "width"), Range(1)),
    **dict.fromkeys(("guidance", "guidance_2", "batch_size", "devices"), Range(0)),
    "samples": SAMPLES,
    "seed": SEED,
    "steps": STEPS,
    "shift": Range(0, above=True),
}
CHOICES = {
    "solver": SOLVERS,
    "schedule": SCHEDULES,
    "dtype": ("auto", *DTYPES),
    "matmul_precision": ("auto", *MATMUL_PRECISIONS),
    "text_encoder": TEXT_ENCODER,
    "weights": WEIGHTS,
    "offload": OFFLOAD,
}
WHOLE = ("frames", "height", "width", "samples", "steps", "batch_size", "devices", "seed")


class Options(TypedDict, total=False):
    """What else `Model.sample` takes: the flags of `wan-sample`, with the same names, ranges and
    defaults. Those of the sampler that are not given are those that the model is published with.
    """

    seed: int  # of the initial noise; 0
    negative_prompt: str  # what to steer away from, with guidance above 1; "wan": Wan's own
    steps: int  # of denoising
    guidance: float  # classifier-free guidance; up to 1 means none
    guidance_2: float  # of the second expert; not given: guidance, if that is
    shift: float  # of the sigma schedule
    solver: str  # one of `wan_jax.choices.SOLVERS`
    schedule: str  # one of `wan_jax.choices.SCHEDULES`
    batch_size: int  # videos sampled at a time; 0: chosen
    devices: int  # number of devices; 0: all of this machine
    dtype: str  # "float32", "bfloat16" or "auto": bfloat16, but float32 on the CPU
    matmul_precision: str  # of float32 products
    attention: str  # backend, or "auto"
    weights: str  # of the transformer: "dtype", "fp8", "int8" or "nf4"
    text_encoder: str  # "auto", "device" or "cpu"
    offload: str  # of the idle expert of two: "auto", "never" or "always"


@dataclasses.dataclass(frozen=True, eq=False)
class Videos:
    """N videos of one shape. A notebook shows them as a picture of their first frames.

    Attributes:
        frames: uint8 [N, T, H, W, 3] RGB; pictures have T = 1.
        prompts: one for each video.
        finite: whether all numbers of a video are finite, bool [N]; the others are black. None: all.
        fps: frames per second.
    """

    frames: np.ndarray
    prompts: Sequence[str]
    finite: np.ndarray | None = None
    fps: float = 16.0

    def __post_init__(self):
        if self.frames.dtype != np.uint8 or self.frames.shape[4:] != (3,) or not self.frames.size:
            raise UserError(
                f"frames={self.frames.dtype}{list(self.frames.shape)} must be uint8 [N, T, H, W, 3]"
            )
        if len(self.prompts) != len(self.frames):
            raise UserError(
                f"{len(self.frames)} videos need as many prompts, not {len(self.prompts)}"
            )
        if self.finite is None:
            object.__setattr__(self, "finite", np.ones(len(self.frames), bool))

    def __len__(self) -> int:
        return len(self.frames)

    def __repr__(self) -> str:
        n, t, h, w, _ = self.frames.shape
        return f"<Videos: {n} of {t} x {h} x {w}, {self.fps:g} fps>"

    def sheet(self, columns: int = 4, least_height: int = 128) -> np.ndarray:
        """Return the first frames in a grid, uint8 [height, width, 3]. Small ones are enlarged by a
        whole factor to at least `least_height` pixels.
        """
        scale = -(-least_height // self.frames.shape[2])
        return media.contact_sheet(media.upscale(self.frames[:, 0], scale), columns)

    def save(self, path: str | os.PathLike, scale: int = 1) -> list[pathlib.Path]:
        """Write each video to a file, and return the files. A number is added to the name of `path`
        if there are several. scale: a whole factor to enlarge them by. Raises `UserError` on a
        suffix that is not .png (for pictures), .mp4 or .gif.
        """
        path = pathlib.Path(path)
        files = [path]
        if len(self) > 1:
            files = [path.with_name(f"{path.stem}_{i:03d}{path.suffix}") for i in range(len(self))]
        with cli.user_input():
            media.check_suffix(path, self.frames.shape[1])
            path.parent.mkdir(parents=True, exist_ok=True)
            for file, video in zip(files, self.frames):
                media.write(file, video, self.fps, scale)
        return files

    def _repr_png_(self) -> bytes:
        return media.png_bytes(self.sheet())


@dataclasses.dataclass(frozen=True, repr=False)
class Model:
    """A converted model, whose folder was checked. Its networks are in memory only while it samples.

    Attributes:
        folder: the model's folder.
        checkpoint: with trained weights: RUN, RUN/best or RUN/checkpoints/EPOCH; None: the base.
    """

    folder: model_dir.ModelDir
    checkpoint: str | None = None

    def __repr__(self) -> str:
        trained = f", checkpoint={self.checkpoint!r}" if self.checkpoint else ""
        return f"{type(self).__name__}({str(self.folder.path)!r}{trained})"

    def sample(
        self,
        prompts: str | Sequence[str],
        *,
        samples: int = 1,
        frames: int = 1,
        height: int = 480,
        width: int = 832,
        **options: Unpack[Options],
    ) -> Videos:
        """Sample `samples` videos for each prompt, prompt by prompt.

        Each call loads the networks and compiles; sample many prompts in one call. Videos that are
        not finite numbers are black and are warned of. Raises `UserError` on values that
        `wan-sample` refuses, before anything is loaded.

        frames, height, width: of a video, in pixels; 1 + 4k frames, multiples of 16.
        """
        texts = (prompts,) if isinstance(prompts, str) else tuple(prompts)
        numbers = {"samples": samples, "frames": frames, "height": height, "width": width}
        with cli.user_input():
            given = {name: value for name, value in options.items() if value is not None}
            request = self._request(texts, numbers | given)
        cli.enable_compilation_cache()
        precision.use(request.place.precision)
        table = sampling.encode(request)
        batches = [b.videos for b in sampling.sample(request, table, sampling.load(request))]
        finite = np.concatenate([videos.finite for videos in batches])
        if not finite.all():
            warnings.warn(
                f"{(~finite).sum()} of {len(finite)} videos are not finite numbers. "
                f"{pipeline.NOT_FINITE}",
                stacklevel=2,
            )
        return Videos(
            np.concatenate([videos.frames for videos in batches]),
            [texts[i] for i in request.prompt_of],
            finite,
            request.settings.fps,
        )

    def _request(self, prompts: Sequence[str], options: dict[str, Any]) -> sampling.SampleRequest:
        """Return the checked request of `sample`. options: the other arguments by name. Raises
        `UserError` or ValueError.
        """
        check_options(options)
        if not prompts or not all(isinstance(prompt, str) and prompt.strip() for prompt in prompts):
            raise UserError(f"prompts={list(prompts)!r}: give at least one, and none that is empty")
        given = {f.name: options[f.name] for f in dataclasses.fields(Given) if f.name in options}
        size = options["frames"], options["height"], options["width"]
        settings = choose_settings(self.folder, *size[1:], Given(**given))
        for name, needed in settings.unused(len(self.folder.experts)).items():
            if options.get(name, "") != "":
                raise UserError(f"{name}={options[name]!r} has no effect: it needs {needed}")
        settings.make_solver()  # raises where steps and shift do not fit
        names = ("devices", "batch_size", "dtype", "attention", "weights", "text_encoder")
        placement = {name: options[name] for name in names if name in options}
        request = sampling.SampleRequest(
            self.folder,
            self.checkpoint,
            tuple(prompts),
            negative_prompt(options.get("negative_prompt", "")),
            options["samples"],
            *size,
            settings,
            choose_placement(
                self.folder,
                len(prompts) * options["samples"],
                options["frames"],
                precision=options.get("matmul_precision", "auto"),
                **placement,
            ),
            seed=options.get("seed", 0),
            offload=options.get("offload", "auto"),
        )
        _ = request.shape  # raises on sizes that Wan cannot make
        return request


def load(
    folder: str | os.PathLike,
    checkpoint: str | os.PathLike | None = None,
    loras: Sequence[str] = (),
) -> Model:
    """Open a converted model, without reading its weights.

    folder: written by `convert.from_diffusers.convert`. checkpoint: trained weights to sample with:
    a run's folder (its newest checkpoint), RUN/best or RUN/checkpoints/EPOCH. loras: files to merge,
    FILE[:SCALE] each. Raises `UserError` where one of them does not exist, is damaged or belongs to
    another model.
    """
    trained = None if checkpoint is None else os.fspath(checkpoint)
    single = trained is not None and trained_weights.used_single_expert(trained)
    with cli.user_input():
        opened = model_dir.open_model(os.fspath(folder), single_expert=single)
        return Model(merged_loras.merge_with_checkpoint(opened, trained, loras), trained)


def check_options(options: dict[str, Any]) -> None:
    """Raise `UserError` on an argument that `Model.sample` does not have, or a value out of range."""
    known = [*RANGES, *get_type_hints(Options)]
    for name, value in options.items():
        if name not in known:
            similar = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {similar[0]}?" if similar else f"it has {', '.join(known)}"
            raise UserError(f"sample has no option {name!r}; {hint}")
        if name in RANGES:
            kind = int if name in WHOLE else (int, float)
            if isinstance(value, bool) or not isinstance(value, kind) or not math.isfinite(value):
                raise UserError(
                    f"{name}={value!r} must be a {'whole ' if name in WHOLE else ''}number"
                )
            if value not in RANGES[name]:
                raise UserError(f"{name}={value!r} {RANGES[name].requirement(value)}")
        elif not isinstance(value, str):
            raise UserError(f"{name}={value!r} must be a text")
        elif name in CHOICES and value not in CHOICES[name]:
            raise UserError(f"{name}={value!r} must be one of {', '.join(CHOICES[name])}")

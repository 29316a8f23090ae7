"""The largest videos that fit a device: the update is compiled at a few sizes, and its memory
is interpolated between them.
"""

import dataclasses

from grpo.compiled import compile
from grpo.compiled.functions import Functions
from grpo.compiled.targets import Target, compilable
from grpo.settings.video_sizes import Size
from wan_jax.distributed import mesh as mesh_lib
from wan_jax.distributed.memory import GIB
from wan_jax.errors import UserError
from wan_jax.models import vae_chunks

# Sizes and lengths of the search for the largest videos. Sizes that a model cannot make are skipped.
SIZES = ((240, 416), (512, 512), (480, 832), (704, 1280))
FRAMES = (1, 9, 17, 33, 49, 65, 81)


@dataclasses.dataclass(frozen=True)
class Point:
    """A compiled update: bytes of temporaries and results at a number of tokens a video."""

    tokens: int
    work: int


def resized(functions: Functions, frames: int, height: int, width: int) -> Functions:
    """Return the functions for videos of this size, in training and evaluation. Raises `UserError`
    on sizes that the model cannot make.
    """
    size = Size(frames, height, width, functions.spec.recipe.sample.shift)
    spec = functions.spec.of_sizes(size, size)
    spec.check_size(size)  # raises where the model cannot make it
    return dataclasses.replace(functions, spec=spec)


def interpolated_work(points: list[Point], tokens: int) -> float:
    """Return the work in bytes at `tokens`, by linear interpolation between the compiled points and
    extrapolation beyond them.
    """
    points = sorted(points, key=lambda point: point.tokens)
    above = (i for i, point in enumerate(points) if point.tokens >= tokens and i)
    right = next(above, len(points) - 1)
    a, b = points[right - 1], points[right]
    return a.work + (b.work - a.work) * (tokens - a.tokens) / (b.tokens - a.tokens)


def estimated_peak(functions: Functions, resident: int, points: list[Point]) -> tuple[float, str]:
    """Return (peak memory in bytes, the stage that needs it) at the run's size.

    resident: bytes that are on the device throughout. The update's work is interpolated from
    `points`, the decoder's is that of `vae_chunks`. The rollout needs less than the update, which
    contains a forward pass, too.
    """
    spec = functions.spec
    batches = [functions.update_batch(expert) for expert in spec.trained_experts]
    waiting = [functions.waiting(expert) for expert in spec.trained_experts]
    update = max(compile.device_bytes(arrays) for arrays in zip(batches, waiting))
    update += interpolated_work(points, spec.tokens)
    latents = functions.latents()
    local_shape = latents.sharding.shard_shape(latents.shape)
    chunk = vae_chunks.choose_chunk(spec.preset.vae, local_shape)
    decode = vae_chunks.decode_bytes(spec.preset.vae, local_shape, chunk)
    decode += compile.device_bytes(functions.trajectories)
    return max((resident + update, "the update"), (resident + decode, "the decoder"))


def largest_videos(
    functions: Functions, resident: int, limit: int, points: list[Point]
) -> list[str]:
    """Return a line for each of SIZES that the model can make: the largest of FRAMES that fits into
    `limit` bytes, and the stage that would not fit with more.
    """
    lines = []
    for height, width in SIZES:
        best, obstacle = "none", ""
        for frames in FRAMES:
            try:
                candidate = resized(functions, frames, height, width)
            except UserError:  # not a size of this model
                break
            needed, stage = estimated_peak(candidate, resident, points)
            if needed > limit:
                obstacle = f" ({frames} would need {needed / GIB:.0f} GiB in {stage})"
                break
            best = f"{frames} frame{'s' * (frames > 1)}"
        if best != "none" or obstacle:
            lines.append(f"  {height} x {width}: {best}{obstacle}")
    return lines


def search_points(functions: Functions, target: Target) -> list[Point]:
    """Compile the update at the search's largest size and at a medium one."""
    points = []
    for size in ((33, 480, 832), (81, 704, 1280)):
        other = resized(compilable(functions, target), *size)
        measured = compile.measure(other.update(other.spec.trained_experts[0]), target.options)
        label = " x ".join(map(str, size))
        print(f"  compiled: update for {label}, {measured.seconds:.1f} s", flush=True)
        points.append(Point(other.spec.tokens, measured.work))
    return points


def search_lines(
    functions: Functions, needed: compile.Memory, target: Target, remat: str
) -> list[str]:
    """Search for the largest videos that fit, and return the lines of the result.

    needed: the memory of `functions`. remat: the recipe's `model.remat`; 'auto' is 'block' at the
    largest sizes, so that is compiled.
    """
    run = functions.spec
    lean = run.changed(model={"remat": "block"}) if remat == "auto" else run
    update = next(program for program in needed.programs if program.name.startswith("update"))
    points = [Point(run.tokens, update.work)] if lean.remat == run.remat else []
    lean_functions = Functions(lean, functions.text_rows)
    known = {point.tokens for point in points}
    points += [p for p in search_points(lean_functions, target) if p.tokens not in known]
    share = run.recipe.sample.batch_size // mesh_lib.batch_shards(run.mesh)
    assert target.limit is not None
    return [
        f"largest videos at {share} a device, of {', '.join(map(str, FRAMES))} frames (update "
        f"compiled at {', '.join(str(point.tokens) for point in points)} tokens, interpolated "
        "between; decoder by wan_jax/models/vae_chunks.py):",
        *largest_videos(lean_functions, needed.resident_total, target.limit, points),
    ]

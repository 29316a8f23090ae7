"""What a training run will need and cost, before there are weights or the GPU it is for.

    python -m grpo.plan --config=configs/wan21_14b_ocr.py --device=mi300x --devices=4
    [--config.mesh.fsdp=4 ...]

Prints the memory of a device by XLA's analysis of the compiled programs, seconds of an epoch and of
an evaluation from FLOPs and a stated share of the peak rate, and the largest clips that fit. The
device is one that is here (`here`), or one of `costs.KINDS`: MI300X through XLA's ROCm compiler
where JAX's ROCm plugin is installed (no GPU needed), any other by the programs as XLA compiles them
for the CPU, which is an estimate and says so. The model is the recipe's converted folder, or a
published configuration (`--model`) where there is none yet.
"""

import dataclasses
import os
import pathlib
import time
from itertools import chain

import jax
from absl import flags
from ml_collections import config_flags

from grpo.compiled import compile, costs, rocm_compiler
from grpo.compiled.functions import TEXT_ROWS, Functions, Program
from grpo.compiled.placement import choose_mesh
from grpo.data.prompts import load_prompts
from grpo.run import RunSpec, changed, trained_names
from grpo.settings import parse
from grpo.settings.reference import FLAG_HELP
from rewards.ocr.targets import parse_targets
from wan_jax.command_line import cli
from wan_jax.command_line.flag_types import define_number
from wan_jax.command_line.limits import Range
from wan_jax.distributed import memory
from wan_jax.distributed import mesh as mesh_lib
from wan_jax.distributed.memory import GIB
from wan_jax.errors import UserError
from wan_jax.inference import pipeline
from wan_jax.models import presets, vae_chunks
from wan_jax.models.attention import choose_backend, platform_of
from wan_jax.storage import model_dir

# of the search; a model leaves out what it cannot make
SIZES = ((240, 416), (512, 512), (480, 832), (704, 1280))
FRAMES = (1, 9, 17, 33, 49, 65, 81)
# JAX's variable: the part of a GPU that a process takes, 0.75 if unset
FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"
# nothing is tuned for a device that is not there, and untuned Triton products may ask for more than
# gfx942 has
ABSENT_ROCM = {"xla_gpu_enable_triton_gemm": False}
# XLA for the CPU computes bfloat16 products in float32 copies of whole weights and activations,
# which took 2.3 to 3.7 times the ROCm compiler's temporaries; compiled in float32 it was 1.3 to 1.8
# times for the update of 1.3B and 14B
CPU_NOTE = (
    "no compiler for this device here: an estimate from the programs in float32 as XLA compiles "
    "them for the CPU; against XLA's ROCm compiler that gave 1.3 to 1.8 times the update's work"
)


@dataclasses.dataclass(frozen=True)
class Target:
    """What to plan for, and what to compile with."""

    kind: costs.Kind | None  # None: its rates are not known
    devices: list[jax.Device]  # to compile for
    platform: str  # of `devices`, as `attention.platform_of` names it
    limit: int | None  # bytes of a device
    compiler: str
    notes: tuple[str, ...] = ()
    options: dict | None = None  # of the compiler

    @property
    def own(self) -> bool:
        """Whether the compiler is the device's own."""
        return self.kind is None or self.kind.platform == self.platform


def choose_target(device: str, count: int) -> Target:
    """`count` devices of this name; 0: all that are here, or one. Raises `UserError` where there
    are fewer here.
    """
    if device == "here":
        devices = jax.devices()
        if count > len(devices):
            raise UserError(
                f"--devices={count}: {len(devices)} are here; name the device to plan for with "
                "--device"
            )
        chosen = devices[: count or len(devices)]
        return Target(
            costs.kind_of(chosen[0]),
            chosen,
            platform_of(chosen[0]),
            memory.limit(chosen[0]),
            f"XLA for {chosen[0].device_kind}",
        )
    kind = costs.KINDS[device]
    fraction = float(os.environ.get(FRACTION, 0.75))
    limit = int(kind.memory * fraction)
    notes = (f"limit: {fraction:g} of {kind.memory / GIB:.0f} GiB ({FRACTION})",)
    if kind.platform == "rocm":
        if (obstacle := rocm_compiler.why_not()) is None:
            rocm_compiler.load()
            # programs for absent devices cannot be read back
            jax.config.update("jax_enable_compilation_cache", False)
            return Target(
                kind,
                rocm_compiler.mi300x(count or 1),
                "rocm",
                limit,
                "XLA's ROCm compiler for gfx942",
                notes,
                ABSENT_ROCM,
            )
        notes += (f"no ROCm compiler: {obstacle}",)
    notes += (CPU_NOTE,)
    simulated = jax.devices("cpu")[: count or 1]
    if len(simulated) < count:
        raise UserError(
            f"--devices={count}: XLA_FLAGS allows {len(simulated)} simulated devices; leave "
            "xla_force_host_platform_device_count out of it"
        )
    return Target(kind, simulated, "cpu", limit, "XLA for the CPU", notes)


def choose_model(c, name: str | None) -> tuple[presets.Preset, int, str]:
    """(the configuration, rows of the prompts, where it is from): --model, else the recipe's
    folder, else the published one of the folder's name; without its tokenizer the rows are a guess.
    """
    path = c.model.path
    if name is None and pathlib.Path(path).is_dir():
        model = model_dir.open_model(path)
        prompts = (
            load_prompts(file, parse_targets).prompts
            for file in (c.prompts.train, c.prompts.heldout)
        )
        return (
            presets.of_folder(model),
            pipeline.text_rows(model, [*chain(*prompts)], c.prompts.negative),
            path,
        )
    name = name or pathlib.Path(path).name
    if name not in presets.PRESETS:
        raise UserError(
            f"config.model.path={path} does not exist; convert the model first (python -m "
            f"convert.from_diffusers), or give --model, one of {', '.join(presets.PRESETS)}"
        )
    return presets.PRESETS[name], TEXT_ROWS, f"{name} as published"


def compiled_backend(
    setting: str, target: Target, dtype, head_dim: int
) -> tuple[str, tuple[str, ...]]:
    """(the attention to compile, notes): the target's, or chunked where that cannot be compiled
    here.
    """
    if target.own:
        return choose_backend(setting, target.platform, dtype, head_dim), ()
    wanted = choose_backend(setting, target.kind.platform, dtype, head_dim)
    if wanted in ("xla", "chunked"):
        return wanted, ()
    return "chunked", (
        f"attention {wanted} cannot be compiled here; chunked attention stands in, memory linear "
        "in the tokens as well",
    )


def compile_all(functions: Functions, target: Target, offload: bool) -> compile.Memory:
    """Do what `compile.compile_all` does with the target's compiler, or its stand-in."""
    measured = []
    stand_ins = compiled_as(functions, target).programs()
    for program, stand_in in zip(functions.programs(), stand_ins):
        measured.append(measure(program, stand_in, target))
        say(f"  compiled: {program.name}, {measured[-1].seconds:.1f} s")
    return compile.Memory(
        compile.what_stays(functions, offload),
        tuple(measured),
        compile.what_waits(functions, offload),
    )


def measure(program: Program, stand_in: Program, target: Target) -> compile.Measured:
    """Return the stand-in's work beside the program's own data."""
    return dataclasses.replace(
        compile.measure(stand_in, target.options), data=compile.data_bytes(program)
    )


def compiled_as(functions: Functions, target: Target) -> Functions:
    """Return what is compiled for what functions need beside their arguments: `CPU_NOTE`."""
    if target.own:
        return functions
    recipe = changed(functions.spec.recipe, model={"dtype": "float32"})
    settings = dataclasses.replace(functions.spec.settings, dtype=parse.DTYPES["float32"])
    spec = dataclasses.replace(functions.spec, recipe=recipe, settings=settings)
    return dataclasses.replace(functions, spec=spec)


@dataclasses.dataclass(frozen=True)
class Point:
    """A compiled update: bytes of temporaries and results for videos of so many tokens."""

    tokens: int
    work: int


def resized(functions: Functions, frames: int, height: int, width: int) -> Functions:
    """Return the run with clips of this size, evaluated at it too. Raises `UserError` on sizes the
    model cannot make.
    """
    spec = functions.spec.changed(
        sample={"frames": frames, "frame_schedule": (), "height": height, "width": width},
        eval={"frames": 0, "more_frames": ()},
    )
    _ = spec.shape
    return dataclasses.replace(functions, spec=spec)


def between(points: list[Point], tokens: int) -> float:
    """The work at `tokens`, on straight lines through the compiled points; beyond them the nearest
    line goes on.
    """
    points = sorted(points, key=lambda p: p.tokens)
    right = next((i for i, p in enumerate(points) if p.tokens >= tokens and i), len(points) - 1)
    a, b = points[right - 1], points[right]
    return a.work + (b.work - a.work) * (tokens - a.tokens) / (b.tokens - a.tokens)


def estimated_peak(functions: Functions, base: int, points: list[Point]) -> tuple[float, str]:
    """Return (bytes, in what) at the run's size: the update's work by the points, the decoder's by
    `vae_chunks`, the rest counted. The rollout needs less than the update, which holds a forward
    pass, too.
    """
    spec = functions.spec
    batches = [functions.update_batch(expert) for expert in spec.trained_experts]
    kept = compile.device_bytes(functions.trajectories)
    update = kept + max(map(compile.device_bytes, batches)) + between(points, spec.tokens)
    latents = functions.latents()
    local = latents.sharding.shard_shape(latents.shape)
    chunk = vae_chunks.choose_chunk(spec.preset.vae, local)
    decode = kept + vae_chunks.decode_bytes(spec.preset.vae, local, chunk)
    return max((base + update, "the update"), (base + decode, "the decoder"))


def largest_clips(functions: Functions, base: int, limit: int, points: list[Point]) -> list[str]:
    """For each of SIZES that the model can make, the most of FRAMES that fit, and what is in the
    way of more.
    """
    lines = []
    for height, width in SIZES:
        best, obstacle = "none", ""
        for frames in FRAMES:
            try:
                needed, place = estimated_peak(
                    resized(functions, frames, height, width), base, points
                )
            except UserError:  # not a size of this model
                break
            if needed > limit:
                obstacle = f" ({frames} would need {needed / GIB:.0f} GiB in {place})"
                break
            best = f"{frames} frame{'s' * (frames > 1)}"
        if best != "none" or obstacle:
            lines.append(f"  {height} x {width}: {best}{obstacle}")
    return lines


def search_points(functions: Functions, target: Target) -> list[Point]:
    """Compile the update at the search's largest size and at one in the middle."""
    points = []
    for size in ((33, 480, 832), (81, 704, 1280)):
        other = resized(compiled_as(functions, target), *size)
        found = compile.measure(other.update(other.spec.trained_experts[0]), target.options)
        say(f"  compiled: update for {' x '.join(map(str, size))}, {found.seconds:.1f} s")
        points.append(Point(other.spec.tokens, found.work))
    return points


def say(*lines: str):
    print(*lines, sep="\n", flush=True)


def main(_):
    f = flags.FLAGS
    c = f["config"].value
    if f.device != "here":
        # the target's devices are described, not looked for
        jax.config.update("jax_platforms", "cpu")
        # else the ROCm plugin says at length that there are none
        jax.config.update("jax_logging_level", "CRITICAL")
        if f.devices and "xla_force_host_platform_device_count" not in os.environ.get(
            "XLA_FLAGS", ""
        ):
            jax.config.update("jax_num_cpu_devices", f.devices)
    start = time.monotonic()
    cli.enable_compilation_cache()
    with cli.user_input():
        c = parse.recipe_from_config(c)
        s = parse.settings_of(c)
        target = choose_target(f.device, f.devices)
        preset, rows, source = choose_model(c, f.model)
        trained = len(trained_names(preset, c))
        mesh, placed = choose_mesh(
            c,
            s,
            preset.transformer,
            experts=len(preset.experts),
            trained=trained,
            devices=target.devices,
            memory=target.limit,
        )
        backend, notes = compiled_backend(
            c.model.attention, target, s.dtype, preset.transformer.attention_head_dim
        )
        run = RunSpec(c, s, preset, mesh, backend, target.limit, placed)
        run = run.changed(model={"remat": run.remat})  # the same at every size
        functions = Functions(run, rows)
        offload = compile.offloads(functions, target.limit)
    label = target.kind.label if target.kind else target.devices[0].device_kind
    say(
        f"{source} on {mesh.size} x {label}: {c.sample.batch_size} clips of {c.sample.frames} x "
        f"{c.sample.height} x {c.sample.width} a batch ({run.tokens} tokens each), latents "
        f"{' x '.join(map(str, run.shape))}, prompts of {rows} tokens",
        placed,
        f"compiled by {target.compiler}, attention {backend}, weights {c.model.dtype}, "
        f"rematerialisation {run.remat}",
        *target.notes,
        *notes,
    )

    # ---- memory ----------------------------------------------------------------------------------
    needed = compile_all(functions, target, offload)
    encoder = measure(functions.encode_text(), compiled_as(functions, target).encode_text(), target)
    say(
        *needed.table(target.limit),
        f"  before that the text encoder, {(encoder.work + encoder.data) / GIB:.2f} GiB",
    )
    try:
        compile.check_fits(needed, run, offload, target.limit)
    except UserError as error:
        say(f"does not fit: {error}")

    # ---- seconds ---------------------------------------------------------------------------------
    if target.kind is None:
        say(f"seconds: the rates of {label} are not known here; known are {', '.join(costs.KINDS)}")
    else:
        for frames in run.trained_frames:
            at_length = functions.with_frames(frames, run.evaluated_frames[0])
            if len(run.trained_frames) > 1:
                say(f"with {frames} frames:")
            say(
                *seconds_lines(
                    at_length,
                    target.kind,
                    given_efficiency(f, costs.default_efficiency(run, target.kind)),
                )
            )

    # ---- the largest clips -----------------------------------------------------------------------
    if target.limit is None or not f.search:
        say(
            "largest clips: not searched, "
            + ("--nosearch" if target.limit else "the device states no limit")
        )
    elif backend == "xla":
        say("largest clips: not searched, dense attention needs memory quadratic in the tokens")
    else:
        update = next(p for p in needed.programs if p.name.startswith("update"))
        # as 'auto' falls back to
        lean = run.changed(model={"remat": "block"}) if c.model.remat == "auto" else run
        points = [Point(run.tokens, update.work)] if lean.remat == run.remat else []
        lean = Functions(lean, rows)
        points += [
            p for p in search_points(lean, target) if p.tokens not in {q.tokens for q in points}
        ]
        share = c.sample.batch_size // mesh_lib.batch_shards(mesh)
        say(
            f"largest clips at {share} videos a device, of {', '.join(map(str, FRAMES))} frames "
            f"(update compiled at {', '.join(str(p.tokens) for p in points)} tokens, lines "
            "between; decoder by wan_jax/models/vae_chunks.py):"
        )
        say(*largest_clips(lean, needed.base, target.limit, points))
    say(f"planned in {time.monotonic() - start:.0f} s")


def given_efficiency(f, default: costs.Efficiency) -> costs.Efficiency:
    """The flags' shares in place of the default ones."""
    names = ("rollout", "update", "decode")
    given = {
        name: value for name in names if (value := getattr(f, f"{name}_efficiency")) is not None
    }
    return dataclasses.replace(
        default,
        **given,
        source=default.source
        if not given
        else f"{', '.join(given)} by the flags, the others {default.source}",
    )


def seconds_lines(
    functions: Functions, kind: costs.Kind, efficiency: costs.Efficiency
) -> list[str]:
    run = functions.spec
    c, stages = run.recipe, costs.seconds(functions, kind, efficiency)
    parts = {name: stages[name] for name in ("sample", "decode", "update")}
    epoch, evaluations = sum(parts.values()), c.epochs // c.eval.every + 1
    return [
        f"seconds, estimated, without scoring: an epoch {epoch:.1f} ("
        + ", ".join(f"{name} {value:.1f}" for name, value in parts.items())
        + f"), {run.settings.videos} videos",
        f"  an evaluation {stages['evaluation']:.1f}, {c.eval.num_prompts} videos; {c.epochs} "
        f"epochs with one every {c.eval.every}: "
        f"{(c.epochs * epoch + evaluations * stages['evaluation']) / 3600:.1f} h",
        f"  at {efficiency.rollout:g}, {efficiency.update:g} and {efficiency.decode:g} of "
        f"{kind.label}'s {kind.bf16 / 1e12:.4g} TFLOP/s bf16, {kind.fp32 / 1e12:.4g} fp32 "
        f"(decoder, and a float32 model): {efficiency.source}",
    ]


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, FLAG_HELP, lock_config=True)
    flags.DEFINE_enum("device", "here", ["here", *costs.KINDS], "what to plan for")
    flags.DEFINE_integer(
        "devices", 0, "how many; 0: all that are here, or one of a named kind", lower_bound=0
    )
    flags.DEFINE_enum(
        "model", None, list(presets.PRESETS), "a published model in place of config.model.path"
    )
    share = Range(0, 1, above=True)
    define_number(
        "rollout_efficiency",
        None,
        "share of the peak rate; None: what docs/results.md measured",
        share,
    )
    define_number("update_efficiency", None, "the same, of the update", share)
    define_number("decode_efficiency", None, "the same, of the decoder, of the fp32 rate", share)
    flags.DEFINE_bool(
        "search", True, "look for the largest clips that fit: compiles the update twice more"
    )
    flags.mark_flag_as_required("config")
    cli.run(main)

"""Predicts the memory and the time that a training run needs, without its weights or its GPUs.

    python -m grpo.plan --config=configs/wan21_14b_ocr.py --device=mi300x --devices=4 \\
        [--config.mesh.fsdp=4 ...]

Prints the memory of a device by XLA's analysis of the compiled functions, the seconds of an epoch
and of an evaluation from FLOPs and an assumed share of the peak rate, and the largest videos that
fit. The device is one of this machine (`here`), one of `device_kinds.KINDS`, or a memory such as
`24GiB`. For MI300X and MI325X the functions are compiled by XLA's ROCm compiler where JAX's ROCm
plugin is installed (no GPU is needed). For other absent devices they are compiled for the CPU; the
memory is then an estimate, which the output says. The model is the recipe's converted folder, or a
published configuration (`--model`) where there is no folder yet.
"""

import dataclasses
import os
import pathlib
import time
from itertools import chain

import jax
from absl import flags
from ml_collections import config_flags

from grpo.compiled import compile, costs, device_kinds, rocm_compiler
from grpo.compiled.functions import TEXT_ROWS, Functions, Program
from grpo.compiled.placement import choose_mesh
from grpo.run import RunSpec, open_model, trained_names
from grpo.scoring.reward_pool import load_scored_prompts
from grpo.settings import parse
from grpo.settings.reference import FLAG_HELP
from grpo.settings.schema import Recipe, measured_rewards
from wan_jax.command_line import cli
from wan_jax.command_line.flag_types import define_number, user_path
from wan_jax.command_line.limits import Range
from wan_jax.distributed import memory
from wan_jax.distributed import mesh as mesh_lib
from wan_jax.distributed.memory import GIB
from wan_jax.errors import UserError
from wan_jax.inference import pipeline
from wan_jax.models import precision, presets, vae_chunks
from wan_jax.models.attention import choose_backend, platform_of

# Sizes and lengths of the search for the largest videos. Sizes that a model cannot make are skipped.
SIZES = ((240, 416), (512, 512), (480, 832), (704, 1280))
FRAMES = (1, 9, 17, 33, 49, 65, 81)
# JAX's variable: the share of a GPU's memory that a process takes, 0.75 if unset
FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"
# Triton products are tuned on the device. Without one, untuned products may need more shared memory
# than gfx942 has.
ABSENT_ROCM = {"xla_gpu_enable_triton_gemm": False}
# XLA for the CPU computes bfloat16 products in float32 copies of whole weights and activations,
# which took 2.3 to 3.7 times the ROCm compiler's temporaries. Compiled in float32 it was 1.3 to 1.8
# times, for the update of 1.3B and 14B.
CPU_NOTE = (
    "no compiler for this device here: an estimate from the functions in float32 as XLA compiles "
    "them for the CPU; compared with XLA's ROCm compiler it gave 1.3 to 1.8 times the update's "
    "temporaries"
)


@dataclasses.dataclass(frozen=True)
class Target:
    """The devices to plan for, and how to compile for them.

    Attributes:
        kind: the kind of device; None: one with unknown rates.
        devices: the devices to compile for.
        platform: their platform, as `attention.platform_of` names it.
        limit: memory of a device in bytes; None: unknown.
        compiler: name of the compiler, for the output.
        notes: further lines of the output.
        options: compiler options.
    """

    kind: device_kinds.Kind | None
    devices: list[jax.Device]  # pyright: ignore[reportInvalidTypeForm]
    platform: str
    limit: int | None
    compiler: str
    notes: tuple[str, ...] = ()
    options: dict | None = None

    @property
    def stand_in(self) -> device_kinds.Kind | None:
        """The kind to plan for where the compiler is that of another platform, else None."""
        return self.kind if self.kind and self.kind.platform != self.platform else None


def choose_target(device: str, count: int) -> Target:
    """Return `count` devices with this name; 0: all of this machine, or one of a named kind. Raises
    `UserError` where this machine has fewer.
    """
    if device == "here":
        return _target_here(count)
    kind = device_kinds.named(device)
    assert kind.memory is not None, f"{device} has no memory in device_kinds.KINDS"
    fraction = float(os.environ.get(FRACTION, "0.75"))
    limit = int(kind.memory * fraction)
    notes = (f"limit: {fraction:g} of {kind.memory / GIB:.0f} GiB ({FRACTION})",)
    if not kind.bf16:
        notes += (f"assumed: a {kind.label} of NVIDIA, whose rates are unknown",)
    elif kind != device_kinds.KINDS["h200"]:
        notes += (f"assumed, not measured: the {kind.label} as in its vendor's data sheet",)
    if kind.platform == "rocm":
        obstacle = rocm_compiler.why_not()
        if obstacle is None:
            rocm_compiler.load()
            # the cache cannot read back functions that were compiled for absent devices
            jax.config.update("jax_enable_compilation_cache", False)
            return Target(
                kind,
                rocm_compiler.mi300x(count or 1),
                platform="rocm",
                limit=limit,
                compiler="XLA's ROCm compiler for gfx942",
                notes=notes,
                options=ABSENT_ROCM,
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


def _target_here(count: int) -> Target:
    devices = jax.devices()
    if count > len(devices):
        raise UserError(
            f"--devices={count}: this machine has {len(devices)}; name the device to plan for with "
            "--device"
        )
    chosen = devices[: count or len(devices)]
    return Target(
        costs.kind_of(chosen[0]),
        chosen,
        platform=platform_of(chosen[0]),
        limit=memory.limit(chosen[0]),
        compiler=f"XLA for {chosen[0].device_kind}",
    )


def choose_model(recipe: Recipe, name: str | None) -> tuple[presets.Preset, int, str]:
    """Return (configuration, rows of the prompts' text, its source for the output).

    The configuration is that of `--model` (`name`), else of the recipe's folder, else the published
    one with the folder's name. Without the folder's tokenizer the rows are assumed.
    """
    path = recipe.model.path
    if name is None and pathlib.Path(path).is_dir():
        model = open_model(recipe)
        prompts = (
            load_scored_prompts(
                file,
                recipe.reward,
                measured_rewards(recipe),
                skip_invalid=recipe.prompts.skip_invalid,
            ).prompts
            for file in (
                recipe.prompts.train,
                recipe.prompts.heldout,
                *(user_path(path) for _, path in recipe.eval.more_prompts),
            )
        )
        rows = pipeline.text_rows(model, [*chain(*prompts)], recipe.prompts.negative)
        return presets.of_folder(model), rows, path
    name = name or pathlib.Path(path).name
    if name not in presets.PRESETS:
        raise UserError(
            f"config.model.path={path} does not exist; convert the model first (python -m "
            f"convert.from_diffusers), or give --model, one of {', '.join(presets.PRESETS)}"
        )
    preset = presets.PRESETS[name]
    if recipe.model.single_expert:
        preset = dataclasses.replace(preset, boundary=None)
    return preset, TEXT_ROWS, f"{name} as published"


def compiled_backend(
    setting: str, target: Target, dtype, head_dim: int
) -> tuple[str, tuple[str, ...]]:
    """Return (the attention backend to compile, notes): the target's, or chunked attention where
    the target's cannot be compiled on this machine.
    """
    if target.stand_in is None:
        return choose_backend(setting, target.platform, dtype, head_dim), ()
    wanted = choose_backend(setting, target.stand_in.platform, dtype, head_dim)
    if wanted in ("xla", "chunked"):
        return wanted, ()
    return "chunked", (
        f"attention {wanted} cannot be compiled here; chunked attention is compiled instead, whose "
        "memory is linear in the tokens as well",
    )


def compile_all(functions: Functions, target: Target, offload: bool) -> compile.Memory:
    """Compile all functions of a run with the target's compiler, or with its stand-in, and return
    the memory that they need (`compile.compile_all`).
    """
    measured = []
    stand_ins = compilable(functions, target).programs()
    for program, stand_in in zip(functions.programs(), stand_ins):
        measured.append(measure(program, stand_in, target))
        print_lines(f"  compiled: {program.name}, {measured[-1].seconds:.1f} s")
    return compile.Memory(
        compile.resident_bytes(functions, offload),
        tuple(measured),
        compile.pinned_bytes(functions, offload),
    )


def measure(program: Program, stand_in: Program, target: Target) -> compile.Measured:
    """Return the memory of a function: temporaries of the stand-in as compiled, data of `program`."""
    return dataclasses.replace(
        compile.measure(stand_in, target.options), data=compile.data_bytes(program)
    )


def compilable(functions: Functions, target: Target) -> Functions:
    """Return the functions to compile: `functions`, or in float32 where XLA for the CPU stands in for
    the target's compiler (`CPU_NOTE`).
    """
    if target.stand_in is None:
        return functions
    spec = functions.spec.changed(model={"dtype": "float32"})
    return dataclasses.replace(functions, spec=spec)


@dataclasses.dataclass(frozen=True)
class Point:
    """A compiled update: bytes of temporaries and results at a number of tokens a video."""

    tokens: int
    work: int


def resized(functions: Functions, frames: int, height: int, width: int) -> Functions:
    """Return the functions for videos of this size, in training and evaluation. Raises `UserError`
    on sizes that the model cannot make.
    """
    spec = functions.spec.changed(
        sample={"frames": frames, "frame_schedule": (), "height": height, "width": width},
        eval={"frames": 0, "more_frames": ()},
    )
    spec.shape_of(frames)  # raises where the model cannot make it
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
    trajectories = compile.device_bytes(functions.trajectories)
    update = max(map(compile.device_bytes, batches)) + interpolated_work(points, spec.tokens)
    latents = functions.latents()
    local_shape = latents.sharding.shard_shape(latents.shape)
    chunk = vae_chunks.choose_chunk(spec.preset.vae, local_shape)
    decode = vae_chunks.decode_bytes(spec.preset.vae, local_shape, chunk)
    base = resident + trajectories
    return max((base + update, "the update"), (base + decode, "the decoder"))


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
        print_lines(f"  compiled: update for {label}, {measured.seconds:.1f} s")
        points.append(Point(other.spec.tokens, measured.work))
    return points


def print_lines(*lines: str) -> None:
    print(*lines, sep="\n", flush=True)


def main(_):
    options = flags.FLAGS
    start = time.monotonic()
    prepare_jax(options.device, options.devices)
    cli.enable_compilation_cache()

    # ---- recipe, target, model, mesh -------------------------------------------------------------
    with cli.user_input():
        config = options["config"].value
        assert config is not None, "--config is required"
        recipe = parse.recipe_from_config(config)
        settings = parse.settings_of(recipe)
        precision.use(recipe.model.matmul_precision)
        target = choose_target(options.device, options.devices)
        preset, rows, source = choose_model(recipe, options.model)
        trained = len(trained_names(preset, recipe))
        mesh, placed = choose_mesh(
            recipe,
            settings,
            preset,
            trained=trained,
            devices=target.devices,
            memory=target.limit,
        )
        backend, notes = compiled_backend(
            recipe.model.attention,
            target,
            settings.dtype,
            preset.transformer.attention_head_dim,
        )
        run = RunSpec(recipe, settings, preset, mesh, backend, target.limit, placed)
        run = run.changed(model={"remat": run.remat})  # the same at every size
        functions = Functions(run, rows)
        offload = compile.offloads(functions, target.limit)
    label = target.kind.label if target.kind else target.devices[0].device_kind
    sample = recipe.sample
    print_lines(
        f"{source} on {mesh.size} x {label}: {sample.batch_size} videos of {sample.frames} x "
        f"{sample.height} x {sample.width} a batch ({run.tokens} tokens each), latents "
        f"{' x '.join(map(str, run.shape))}, prompts of {rows} tokens",
        placed,
        f"compiled by {target.compiler}, attention {backend}, weights {recipe.model.dtype}, "
        f"rematerialisation {run.remat}",
        *target.notes,
        *notes,
    )

    # ---- memory ----------------------------------------------------------------------------------
    needed = compile_all(functions, target, offload)
    stand_in = compilable(functions, target).encode_text()
    encoder = measure(functions.encode_text(), stand_in, target)
    print_lines(
        *needed.table(target.limit),
        f"  before that the text encoder, {(encoder.work + encoder.data) / GIB:.2f} GiB",
    )
    try:
        compile.check_fits(needed, run, offload, target.limit)
    except UserError as error:
        print_lines(f"does not fit: {error}")

    # ---- seconds ---------------------------------------------------------------------------------
    if target.kind is None or not target.kind.bf16:
        known = ", ".join(device_kinds.KINDS)
        print_lines(f"seconds: the rates of a {label} are unknown; known are {known}")
    else:
        default = costs.default_efficiency(run, target.kind)
        efficiency = override_efficiency(
            default,
            rollout=options.rollout_efficiency,
            update=options.update_efficiency,
            decode=options.decode_efficiency,
        )
        for frames in run.trained_frames:
            at_length = functions.with_frames(frames, run.evaluated_frames[0])
            if len(run.trained_frames) > 1:
                print_lines(f"with {frames} frames:")
            print_lines(*seconds_lines(at_length, target.kind, efficiency))

    # ---- the largest videos ----------------------------------------------------------------------
    if target.limit is None:
        print_lines("largest videos: not searched, the device states no limit")
    elif not options.search:
        print_lines("largest videos: not searched, --nosearch")
    elif backend == "xla":
        print_lines(
            "largest videos: not searched, dense attention needs memory quadratic in the tokens"
        )
    else:
        print_lines(*search_lines(functions, needed, target, recipe.model.remat))
    print_lines(f"planned in {time.monotonic() - start:.0f} s")


def prepare_jax(device: str, count: int) -> None:
    """Set JAX's platform for a target that is not on this machine: the CPU, as `count` devices."""
    if device == "here":
        return
    jax.config.update("jax_platforms", "cpu")
    # otherwise the ROCm plugin logs that it found no GPU
    jax.config.update("jax_logging_level", "CRITICAL")
    simulated = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if count and not simulated:
        jax.config.update("jax_num_cpu_devices", count)


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


def override_efficiency(default: costs.Efficiency, **given: float | None) -> costs.Efficiency:
    """Return the default shares of the peak rate, with those that a flag sets."""
    known = {name: value for name, value in given.items() if value is not None}
    if not known:
        return default
    source = f"{', '.join(known)} by the flags, the others {default.source}"
    return dataclasses.replace(default, **known, source=source)


def seconds_lines(
    functions: Functions, kind: device_kinds.Kind, efficiency: costs.Efficiency
) -> list[str]:
    """Return the lines about the estimated seconds of an epoch, an evaluation and the run."""
    recipe, videos = functions.spec.recipe, functions.spec.settings.videos
    stages = costs.seconds(functions, kind, efficiency)
    evaluation = stages["evaluation"]
    epoch_stages = {name: stages[name] for name in ("sample", "decode", "update")}
    epoch = sum(epoch_stages.values())
    every = recipe.eval.every
    evaluations = recipe.epochs // every + 1
    hours = (recipe.epochs * epoch + evaluations * evaluation) / 3600
    return [
        f"seconds, estimated, without scoring: an epoch {epoch:.1f} ("
        + ", ".join(f"{name} {value:.1f}" for name, value in epoch_stages.items())
        + f"), {videos} videos",
        f"  an evaluation {evaluation:.1f}, {recipe.eval.num_prompts} videos; {recipe.epochs} "
        f"epochs with one every {every}: {hours:.1f} h",
        f"  at {efficiency.rollout:g}, {efficiency.update:g} and {efficiency.decode:g} of "
        f"{kind.label}'s {kind.bf16 / 1e12:.4g} TFLOP/s bf16, {kind.fp32 / 1e12:.4g} fp32 "
        f"(decoder, and a float32 model): {efficiency.source}",
    ]


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, FLAG_HELP, lock_config=True)
    flags.DEFINE_string("device", "here", f"device to plan for: here, {device_kinds.NAMES}")
    flags.DEFINE_integer(
        "devices",
        0,
        "number of devices; 0: all of this machine, or one of a named kind",
        lower_bound=0,
    )
    flags.DEFINE_enum(
        "model", None, list(presets.PRESETS), "published model instead of config.model.path"
    )
    share = Range(0, 1, above=True)
    define_number(
        "rollout_efficiency",
        None,
        "share of the peak rate that the rollout reaches; None: as measured in docs/results.md",
        share,
    )
    define_number("update_efficiency", None, "the same of the update", share)
    define_number("decode_efficiency", None, "the same of the decoder, of the fp32 rate", share)
    flags.DEFINE_bool(
        "search",
        True,
        "whether to search for the largest videos that fit, which compiles the update twice more",
    )
    flags.mark_flag_as_required("config")
    cli.run(main)

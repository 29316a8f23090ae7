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
import pathlib
import time
from itertools import chain

from absl import flags
from ml_collections import config_flags

from grpo.compiled import compile, costs, device_kinds
from grpo.compiled.functions import Functions
from grpo.compiled.largest_videos import search_lines
from grpo.compiled.placement import choose_mesh
from grpo.compiled.run_arrays import TEXT_ROWS
from grpo.compiled.targets import (
    Target,
    choose_target,
    compilable,
    compiled_backend,
    measure,
    prepare_jax,
    verdict,
)
from grpo.learning import data_loss
from grpo.records.start_warnings import start_warnings
from grpo.run import RunSpec, open_model, trained_names
from grpo.scoring.scored_prompts import load_scored_prompts
from grpo.settings import parse, video_sizes
from grpo.settings.reference import FLAG_HELP
from grpo.settings.schema import Recipe, measured_rewards
from grpo.settings.video_sizes import Size
from wan_jax.command_line import cli
from wan_jax.command_line.flag_types import define_number, user_path
from wan_jax.command_line.limits import Range
from wan_jax.distributed.memory import GIB
from wan_jax.errors import UserError
from wan_jax.inference import pipeline
from wan_jax.models import precision, presets


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
    stored = run.quantisation.kind if run.quantisation else recipe.model.dtype
    print_lines(
        f"{source} on {mesh.size} x {label}: {sample.batch_size} videos of {sample.frames} x "
        f"{sample.height} x {sample.width} a batch ({run.tokens} tokens each), latents "
        f"{' x '.join(map(str, run.shape))}, prompts of {rows} tokens",
        placed,
        f"compiled by {target.compiler}, attention {backend}, weights {stored}, "
        f"rematerialisation {run.remat}",
        *target.notes,
        *notes,
        *start_warnings(run),
    )

    # ---- memory ----------------------------------------------------------------------------------
    needed = compile_all(functions, target, offload)
    stand_in = compilable(functions, target).encode_text()
    encoder = measure(functions.encode_text(), stand_in, target)
    print_lines(
        *needed.table(target.limit),
        f"  before that the text encoder, {(encoder.work + encoder.data) / GIB:.2f} GiB",
    )
    if said := verdict(needed, run, offload, target):
        print_lines(said)

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
        for size in run.trained_sizes:
            if name := video_sizes.suffix(size, run.trained_sizes):
                print_lines(f"with {name.removeprefix(', ')}:")
            of_size = functions.of_sizes(size, run.evaluated_sizes[0])
            print_lines(*seconds_lines(of_size, target.kind, efficiency))
        print_lines(*more_lines(functions, target.kind, efficiency))

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
    recipe, seen = functions.spec.recipe, f"{functions.spec.settings.videos} videos"
    if recipe.data.only:
        rows = recipe.train.updates_per_epoch * data_loss.data_rows(functions.spec)
        seen = f"{rows} clips or pairs of the data"
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
        + f"), {seen}",
        f"  an evaluation {evaluation:.1f}, {recipe.eval.num_prompts} videos; {recipe.epochs} "
        f"epochs with one every {every}: {hours:.1f} h",
        f"  at {efficiency.rollout:g}, {efficiency.update:g} and {efficiency.decode:g} of "
        f"{kind.label}'s {kind.bf16 / 1e12:.4g} TFLOP/s bf16, {kind.fp32 / 1e12:.4g} fp32 "
        f"(decoder, and a float32 model): {efficiency.source}",
    ]


def more_lines(
    functions: Functions, kind: device_kinds.Kind, efficiency: costs.Efficiency
) -> list[str]:
    """Return a line about each further size of evaluations, and one about a run whose videos change
    their size.
    """
    spec = functions.spec
    recipe, trained, evaluated = spec.recipe, spec.trained_sizes, spec.evaluated_sizes

    def seconds(size: Size, evaluation: Size) -> dict[str, float]:
        return costs.seconds(functions.of_sizes(size, evaluation), kind, efficiency)

    each = {size: seconds(trained[0], size)["evaluation"] for size in evaluated[1:]}
    lines = [
        f"an evaluation{video_sizes.suffix(size, evaluated)}: {value:.1f} s, besides the others"
        for size, value in each.items()
    ]
    if len(trained) > 1:
        first = [seconds(size, evaluated[0]) for size in trained]
        stages = ("sample", "decode", "update")
        epoch = dict(zip(trained, [sum(of[name] for name in stages) for of in first]))
        epochs = range(1, recipe.epochs + 1)
        total = sum(epoch[video_sizes.at(number, recipe.sample)] for number in epochs)
        number = recipe.epochs // recipe.eval.every + 1
        total += number * (first[0]["evaluation"] + sum(each.values()))
        lines.append(f"the run, {recipe.epochs} epochs by its schedule: {total / 3600:.1f} h")
    return lines


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, FLAG_HELP, lock_config=True)
    flags.DEFINE_string("device", "here", f"device to plan for: here, {device_kinds.NAMES}")
    flags.DEFINE_integer(
        "devices",
        0,
        "number of devices; 0: all of this machine, or one of a named kind",
        lower_bound=0,
        upper_bound=4096,
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
    define_number(
        "update_efficiency", None, "share of the peak rate that the update reaches", share
    )
    define_number(
        "decode_efficiency", None, "share of the peak fp32 rate that the decoder reaches", share
    )
    flags.DEFINE_bool(
        "search",
        True,
        "whether to search for the largest videos that fit, which compiles the update twice more",
    )
    flags.mark_flag_as_required("config")
    cli.run(main)

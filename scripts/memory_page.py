"""Writes the table of docs/howto/memory.md: what the recipes need on common GPUs, by `grpo.plan`.

    python scripts/memory_page.py

Takes a quarter of an hour on two cores.
"""

import dataclasses
import functools
import pathlib
import sys

import jax

from configs import wan21_1_3b_ocr, wan21_14b_ocr, wan22_a14b_ocr, wan22_ti2v_5b_ocr
from grpo.compiled import compile, costs, device_kinds, targets
from grpo.compiled.functions import Functions
from grpo.compiled.placement import choose_mesh
from grpo.compiled.run_arrays import TEXT_ROWS
from grpo.run import RunSpec, trained_names
from grpo.settings import parse
from wan_jax.distributed.memory import GIB
from wan_jax.models import presets

MODELS = {  # title: recipe, published configuration
    "Wan 2.1 1.3B": (wan21_1_3b_ocr, "wan2.1-1.3b"),
    "Wan 2.2 TI2V-5B": (wan22_ti2v_5b_ocr, "wan2.2-ti2v-5b"),
    "Wan 2.1 14B": (wan21_14b_ocr, "wan2.1-14b"),
    "Wan 2.2 A14B": (wan22_a14b_ocr, "wan2.2-a14b"),
}
KINDS = ("rtx4090", "l40s", "a100-80", "h100", "h200", "b200", "mi300x")
SHARE = 0.95  # XLA_PYTHON_CLIENT_MEM_FRACTION of the page
# the first that fits: videos of a batch, model.remat, model.weights
ATTEMPTS = (
    (9, "save_matmuls", "dtype"),
    (9, "block", "dtype"),
    (9, "block", "fp8"),
    (3, "block", "fp8"),
    (1, "block", "fp8"),
    (1, "block", "nf4"),
)
METHODS = ("grpo", "nft")
PAGE = pathlib.Path(__file__).parents[1] / "docs/howto/memory.md"
HEAD = (
    "| model | GPU | base | batch | dense results | GiB | hours, Flow-GRPO | hours, DiffusionNFT |\n"
    "|---|---|---|--:|---|--:|--:|--:|\n"
)


@functools.cache
def functions_of(title: str, method: str, batch: int, remat: str, weights: str) -> Functions:
    """Return the functions of a model's recipe with pictures of 512x512, on one device."""
    module, name = MODELS[title]
    config = module.get_config()
    config.sample.update(frames=1, height=512, width=512, groups=48, group_size=12)
    config.sample.batch_size, config.model.remat, config.model.weights = batch, remat, weights
    config.train.method, config.train.updates_per_epoch = method, 2
    config.model.path, config.run_dir = name, "none"
    recipe = parse.recipe_from_config(config)
    settings, preset = parse.settings_of(recipe), presets.PRESETS[name]
    trained = len(trained_names(preset, recipe))
    devices = jax.devices("cpu")[:1]
    mesh, placed = choose_mesh(recipe, settings, preset, trained=trained, devices=devices, memory=0)
    return Functions(RunSpec(recipe, settings, preset, mesh, "chunked", None, placed), TEXT_ROWS)


@functools.cache
def update_of(title: str, method: str, batch: int, remat: str, weights: str) -> compile.Measured:
    """Return the memory of the update, compiled for the CPU in float32 (`targets.CPU_NOTE`)."""
    functions = functions_of(title, method, batch, remat, weights)
    expert = functions.spec.trained_experts[0]
    found = compile.measure(targets.for_the_cpu(functions).update(expert))
    print(title, method, batch, remat, weights, f"{found.seconds:.0f} s", file=sys.stderr)
    return dataclasses.replace(found, data=compile.data_bytes(functions.update(expert)))


def peak_of(title: str, method: str, batch: int, remat: str, weights: str, limit: int) -> float:
    """Return the bytes on a device with `limit` bytes during the update."""
    functions = functions_of(title, method, batch, remat, weights)
    resident = compile.resident_bytes(functions, compile.offloads(functions, limit))
    measured = update_of(title, method, batch, remat, weights)
    return compile.Memory(resident, (measured,)).peak(measured)


@functools.cache
def hours_of(
    title: str, method: str, remat: str, weights: str, kind: str, epochs: int = 100
) -> float:
    """Return the predicted hours of the epochs' sampling, decoding and update."""
    functions = functions_of(title, method, 9, remat, weights)
    device = device_kinds.KINDS[kind]
    stages = costs.seconds(functions, device, costs.default_efficiency(functions.spec, device))
    return epochs * sum(stages[name] for name in ("sample", "decode", "update")) / 3600


def row(title: str, kind: str) -> str:
    """Return the row of a model and a GPU."""
    device = device_kinds.KINDS[kind]
    assert device.memory is not None
    limit = int(device.memory * SHARE)
    for batch, remat, weights in ATTEMPTS:
        peak = peak_of(title, "grpo", batch, remat, weights, limit)
        if peak <= limit:
            break
    else:
        return (
            f"| {title} | {device.label} | none | | | {peak / GIB:.0f} of {limit / GIB:.1f} | | |"
        )
    kept = "kept" if remat == "save_matmuls" else "recomputed"
    hours = " | ".join(f"{hours_of(title, method, remat, weights, kind):.0f}" for method in METHODS)
    base = "bf16" if weights == "dtype" else weights
    memory = f"{peak / GIB:.0f} of {limit / GIB:.1f}"
    return f"| {title} | {device.label} | {base} | {batch} | {kept} | {memory} | {hours} |"


def main() -> None:
    targets.prepare_jax("cpu", 1)
    rows = [row(title, kind) for title in MODELS for kind in KINDS]
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(HEAD)
    after = rest.partition("\n\n")[2]
    table = "\n".join(rows)
    PAGE.write_text(f"{before}{HEAD}{table}\n\n{after}", encoding="utf-8")


if __name__ == "__main__":
    main()

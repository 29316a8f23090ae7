"""Measures the README's commands for each model at full size with random weights.

    python -m benchmarks.family --folder /tmp/family
    python -m benchmarks.family --folder /tmp/family --models wan2.1-1.3b,wan2.2-a14b \\
        --stages convert,sample,clip,train,resume,lora

Reports wall time, peak device memory and peak host memory of converting, sampling, training an
epoch with LoRA, resuming and exporting. Every stage is a process of its own; its seconds include
starting Python, reading the weights and compiling. The epoch is the recipe's with 2 groups of 9
pictures, 4 stochastic steps, and evaluations of 9 prompts in 4 steps; the resumed run adds a second
one. "cp" is the rate of `cp` and a sync of the source's largest file.

`--folder` needs space for the model twice (28 to 137 GB in bfloat16); `--source` writes the source
to another disk. In the end only `--folder`/results.json is left. A second call adds to it, and the
rows of a call that was stopped are kept.
"""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

from absl import app, flags

RECIPES = {
    "wan2.1-1.3b": "wan21_1_3b_ocr",
    "wan2.1-14b": "wan21_14b_ocr",
    "wan2.2-a14b": "wan22_a14b_ocr",
    "wan2.2-ti2v-5b": "wan22_ti2v_5b_ocr",
}
EPOCH = {
    "sample.frames": 1,
    "sample.height": 512,
    "sample.width": 512,
    "sample.groups": 2,
    "sample.group_size": 9,
    "sample.batch_size": 9,
    "sample.sde_steps": 4,
    "eval.frames": 1,
    "eval.num_prompts": 9,
    "eval.steps": 4,
    "train.updates_per_epoch": 1,
    "save.every": 1,
    "reward.workers": 4,
}
PROMPT = (
    'A wooden sign with the words "OPEN DAILY" carved into it, on a rainy city street at night.'
)
PEAKS = re.compile(r"peak memory: device ([\d.]+|unknown)(?: GiB)?, host ([\d.]+) GiB")
STAGES = ("convert", "check", "sample", "clip", "train", "resume", "lora", "export")
SHAPES = {
    "sample": ("sample 512x512x1", dict(height=512, width=512)),
    "clip": ("sample 480x832x33", dict(height=480, width=832, frames=33)),
}
GIB = 2**30


@dataclasses.dataclass
class Stage:
    """Time and memory of one command."""

    name: str
    seconds: float
    host_gib: float  # of the largest process
    device_gib: float | None = None
    note: str = ""


def run(name: str, arguments: list[str]) -> tuple[Stage, str]:
    """Run a command and show its output. Ends the benchmark when the command fails.

    The system counts a child's peak memory from its parent's at the start, so this module imports
    little.
    """
    print(f"--- {name}: {' '.join(arguments)}", flush=True)
    start = time.time()
    process = subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    stage = Stage(name, time.time() - start, usage.ru_maxrss * 1024 / GIB)
    print(output[-1500:] + f"    {stage.seconds:.1f} s, {stage.host_gib:.2f} GiB", flush=True)
    if os.waitstatus_to_exitcode(status):
        sys.exit(f"{name} failed")
    if found := PEAKS.search(output):
        stage.device_gib = None if found[1] == "unknown" else float(found[1])
    return stage, output


def python(module: str, **settings) -> list[str]:
    """Return the command of a module; '__' in the name of a flag stands for '.'."""
    return [
        sys.executable,
        "-m",
        module,
        *(f"--{k.replace('__', '.')}={v}" for k, v in settings.items()),
    ]


def size(folder: pathlib.Path) -> int:
    """Return the bytes of all files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def copy_rate(source: pathlib.Path, target: pathlib.Path) -> float:
    """Return the bytes a second of `cp` and `sync` for the source's largest file, uncached."""
    file = max(source.rglob("*.safetensors"), key=lambda path: path.stat().st_size)
    drop_from_cache(file)
    start = time.time()
    subprocess.run(["cp", str(file), str(target)], check=True)
    subprocess.run(["sync", str(target)], check=True)
    rate = file.stat().st_size / (time.time() - start)
    target.unlink()
    return rate


def drop_from_cache(*files: pathlib.Path) -> None:
    """Drop the pages of files from the system's cache."""
    for file in files:
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(
    model: str, folder: pathlib.Path, source: pathlib.Path, dtype: str, stages: list[Stage]
) -> None:
    """Measure all stages of one model; each is added to `stages` when it is done."""
    converted, run_dir = folder / "model", folder / "run"
    run(
        "random weights",
        [
            *python("benchmarks.random_model", model=model, out=source, dtype=dtype),
            *(["--link_expert"] if flags.FLAGS.link_expert else []),
        ],
    )
    rate = copy_rate(source, folder / "copy")
    drop_from_cache(*source.rglob("*.safetensors"))
    stage, _ = run(
        "convert", python("convert.from_diffusers", src=source, dst=converted, dtype="bfloat16")
    )
    read, written = size(source), size(converted)
    stage.note = (
        f"{read / 1e9:.1f} GB read, {written / 1e9:.1f} GB written, "
        f"{read / stage.seconds / 1e9:.2f} GB/s; cp {rate / 1e9:.2f} GB/s"
    )
    stages.append(stage)
    wanted = flags.FLAGS.stages
    if "check" in wanted:
        stages.append(
            run("check", [*python("convert.from_diffusers", src=source, dst=converted), "--check"])[
                0
            ]
        )
    shutil.rmtree(source)
    for kind in (kind for kind in SHAPES if kind in wanted):
        name, shape = SHAPES[kind]
        out = folder / f"sample.{'gif' if 'frames' in shape else 'png'}"
        stage, output = run(
            name,
            python(
                "wan_jax.sample",
                model=converted,
                prompt=PROMPT,
                dtype="bfloat16",
                steps=20,
                out=out,
                **shape,
            ),
        )
        if match := re.search(r"sample\(s\) of [^;\n]*", output):
            stage.note = match[0]
        stages.append(stage)
    settings = {"config.run_dir": run_dir, "config.model.path": converted}
    settings |= {f"config.{k}": v for k, v in EPOCH.items()}
    for epochs, name in ((1, "train"), (2, "resume")):
        if name not in wanted:
            continue
        stage, _ = run(
            f"{name}, 1 epoch",
            python(
                "grpo.train",
                config=f"configs/{RECIPES[model]}.py",
                **settings,
                **{"config.epochs": epochs},
            ),
        )
        record = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
        stage.note = ", ".join(
            f"{k} {v:.1f} s" for k, v in record["seconds"].items() if k != "save"
        )
        stage.note += f"; checkpoint {size(run_dir / 'checkpoints' / str(epochs)) / 1e9:.2f} GB"
        stages.append(stage)
    for kind, module, name in (
        ("lora", "export_lora", "export LoRA"),
        ("export", "to_diffusers", "export the model"),
    ):
        if kind in wanted:
            out = folder / kind
            stages.append(
                run(name, python(f"convert.{module}", src=converted, checkpoint=run_dir, dst=out))[
                    0
                ]
            )
            stages[-1].note = f"{size(out) / 1e9:.2f} GB"


def table(results: dict[str, list[dict]]) -> str:
    """Return the Markdown table of {model: stages}."""
    lines = [
        "| model | command | seconds | device peak, GiB | host peak, GiB | |",
        "|---|---|--:|--:|--:|---|",
    ]
    for model, stages in results.items():
        lines += [
            f"| {model} | {s['name']} | {s['seconds']:.1f} | "
            f"{'' if s['device_gib'] is None else format(s['device_gib'], '.1f')} | "
            f"{s['host_gib']:.1f} | {s['note']} |"
            for s in stages
        ]
    return "\n".join(lines)


def main(_):
    settings = flags.FLAGS
    folder = pathlib.Path(settings.folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "results.json"
    results = json.loads(path.read_text()) if path.is_file() else {}
    for model in settings.models:
        work = folder / "work"
        source = pathlib.Path(settings.source or folder).absolute() / "source"
        for old in (work, source):
            shutil.rmtree(old, ignore_errors=True)
        work.mkdir()
        stages: list[Stage] = []
        try:
            measure(model, work, source, settings.source_dtype, stages)
        finally:
            for old in (work, source):
                shutil.rmtree(old, ignore_errors=True)
            results[model] = [dataclasses.asdict(s) for s in stages]
            path.write_text(json.dumps(results, indent=2) + "\n")
    print(table(results))


if __name__ == "__main__":
    flags.DEFINE_list("models", list(RECIPES), "models to measure")
    flags.DEFINE_string("folder", None, "folder for models and runs", required=True)
    flags.DEFINE_string("source", None, "folder for the Diffusers folders; None: --folder")
    flags.DEFINE_enum(
        "source_dtype", "bfloat16", ["float32", "bfloat16"], "data type of the Diffusers folders"
    )
    flags.DEFINE_bool(
        "link_expert", False, "use the same files for both experts of A14B in the source"
    )
    flags.DEFINE_list(
        "stages",
        [s for s in STAGES if s not in ("check", "export")],
        "commands to measure; convert always runs, check compares with the source, export writes "
        "the whole model with the adapters merged",
    )
    flags.register_validator(
        "stages", lambda names: set(names) <= set(STAGES), f"known stages: {', '.join(STAGES)}"
    )
    app.run(main)

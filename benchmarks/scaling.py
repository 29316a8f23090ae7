"""Compares several GPUs with one: rollout step and update step of `benchmarks.full_size`, and the parts
of an epoch of `benchmarks.parts`.

    python -m benchmarks.scaling --out build/scaling
    python -m benchmarks.scaling --out build/scaling --works 1.3b-data,14b-full --devices 1,2
    python -m benchmarks.scaling --out build/scaling --works 1.3b-parts,14b-parts --devices 1,2
    python -m benchmarks.scaling --out build/scaling --works=        # print the tables again

Every number of GPUs is measured in a process of its own. Works on the axis `data` give every GPU as
many videos as a single GPU has, so ideally n GPUs process n times the videos in the same time;
works on `context` split one video over all GPUs, ideally in 1 / n of the time; works on `fsdp` run
on as many GPUs as the model needs. Speed-ups compare videos a second. The parts are added up to the
seconds of a video by `benchmarks.epoch_cost`. OUT/results.json is written after every process, and a
second call adds to it.
"""

import dataclasses
import json
import pathlib
import sys
import time

from absl import app, flags

from benchmarks import epoch_cost
from benchmarks.comparison_works import GUIDED, PARTS
from benchmarks.side_by_side import format_ratio, run, verdict
from benchmarks.workload import STEPS, Record

IMAGE = "--height=512 --width=512 --frames=1"
TARGETS = {2: 1.9, 4: 3.75}  # speed-up over one GPU on the axis data
STAGES = ("rollout", "update")


@dataclasses.dataclass(frozen=True)
class Work:
    """One row of the table.

    Attributes:
        title: name in the table.
        axis: 'data', 'fsdp' or 'context'.
        arguments: those of the benchmark.
        batch: videos a GPU, or on the axis context all videos.
        devices: numbers of GPUs to measure.
        module: of benchmarks, full_size or parts.
    """

    title: str
    axis: str
    arguments: str
    batch: int
    devices: tuple[int, ...] = (1, 2, 4)
    module: str = "full_size"

    def videos(self, devices: int) -> int:
        """Return the number of videos on all GPUs."""
        return self.batch * (1 if self.axis == "context" else devices)

    def command(self, devices: int, *extra: str) -> list[str]:
        """Return the command that measures this work."""
        split = [] if self.axis == "data" else [f"--{self.axis}={devices}"]
        return [
            sys.executable,
            "-m",
            f"benchmarks.{self.module}",
            *self.arguments.split(),
            f"--devices={devices}",
            *split,
            f"--batch={self.videos(devices)}",
            *extra,
        ]


WORKS = {
    "1.3b-data": Work("1.3B, LoRA, 9 x 1 x 512 x 512 a GPU", "data", f"--size=1.3b {IMAGE}", 9),
    "1.3b-data-full": Work(
        "1.3B, all weights, 9 x 1 x 512 x 512 a GPU", "data", f"--size=1.3b {IMAGE} --full", 9
    ),
    "14b-data": Work("14B, LoRA, 9 x 1 x 512 x 512 a GPU", "data", f"--size=14b {IMAGE}", 9),
    "14b-full": Work(
        "14B, all weights, 9 x 1 x 512 x 512 a GPU",
        "fsdp",
        f"--size=14b {IMAGE} --full --remat=block",
        9,
        (4,),
    ),
    "14b-full-offload": Work(
        "14B, all weights, optimiser on the host, 9 x 1 x 512 x 512 a GPU",
        "fsdp",
        f"--size=14b {IMAGE} --full --remat=block --offload_optimiser --repeats=1",
        9,
        (2, 4),
    ),
    "a14b-full-offload": Work(
        "A14B, all weights of both, optimiser on the host, 9 x 1 x 512 x 512 a GPU",
        "fsdp",
        f"--size=14b {IMAGE} --experts=2 --full --remat=block --offload_optimiser --repeats=1",
        9,
        (4,),
    ),
    "1.3b-context": Work(
        "1.3B, LoRA, one video of 81 x 480 x 832",
        "context",
        "--size=1.3b --height=480 --width=832 --frames=81 --remat=block --repeats=3",
        1,
    ),
    "1.3b-parts": Work(
        "1.3B, LoRA, fp8, parts of an epoch",
        "data",
        f"--size=1.3b {IMAGE} --weights=fp8 {GUIDED}",
        9,
        (1, 2),
        "parts",
    ),
    "14b-parts": Work(
        "14B, LoRA, fp8, parts of an epoch",
        "data",
        f"--size=14b {IMAGE} --weights=fp8 --guided_remat=block {GUIDED}",
        9,
        (1, 2),
        "parts",
    ),
    "14b-parts-fsdp": Work(
        "14B, LoRA, bf16, parts of an epoch",
        "fsdp",
        f"--size=14b {IMAGE} --remat=block --guided_remat=block {GUIDED}",
        9,
        (1, 2),
        "parts",
    ),
    "tiny-data": Work(
        "tiny, LoRA, 2 x 1 x 32 x 32 a GPU",
        "data",
        "--size=tiny --height=32 --width=32 --frames=1",
        2,
        (1, 2),
    ),
}


def speed_up(work: Work, records: dict[int, Record], devices: int, stage: str) -> float | None:
    """Return videos a second relative to one GPU, or None if either was not measured."""
    if 1 not in records or devices not in records:
        return None
    rates = [work.videos(n) / records[n].stages[stage].ms for n in (devices, 1)]
    return rates[0] / rates[1]


def row(work: Work, records: dict[int, Record], devices: int) -> str:
    """Return the row of one number of GPUs."""
    stages = records[devices].stages
    cells, reached = [work.title, f"{work.axis} {devices}"], []
    for stage in STAGES:
        times = speed_up(work, records, devices, stage)
        cells += [
            f"{stages[stage].ms:.1f}",
            f"{stages[stage].tflops:.0f}",
            "" if times is None else f"{times:.2f}",
        ]
        if work.axis == "data" and devices in TARGETS and times is not None:
            reached.append(f"{stage} {TARGETS[devices]:g}: {verdict(times >= TARGETS[devices])}")
    peak = stages["update"].peak_gib
    return (
        "| "
        + " | ".join([*cells, "" if peak is None else f"{peak:.1f}", "; ".join(reached)])
        + " |"
    )


HEAD = (
    "work",
    "GPUs",
    "rollout, ms",
    "TFLOP/s a GPU",
    "x one",
    "update, ms",
    "TFLOP/s a GPU",
    "x one",
    "peak GiB",
    "targets",
)
RULE = "|---|---|" + "--:|" * 7 + "---|"


def parts_row(work: Work, records: dict[int, Record], devices: int) -> str:
    """Return the row of one number of GPUs of a work of parts."""
    stages, videos = records[devices].stages, work.videos(devices)
    cells = [work.title, f"{work.axis} {devices}", *(f"{stages[part].ms:.1f}" for part in PARTS)]
    for method in epoch_cost.METHODS:
        seconds, relative = epoch_cost.seconds(method, records[devices], STEPS, videos), ""
        if devices > 1 and 1 in records:
            one = epoch_cost.seconds(method, records[1], STEPS, work.videos(1))
            relative = f" ({one / seconds:.2f})"
        cells.append(f"{seconds:.3f}{relative}")
    peak = max((stage.peak_gib or 0.0 for stage in stages.values()), default=0.0)
    return "| " + " | ".join([*cells, f"{peak:.1f}" if peak else ""]) + " |"


PARTS_HEAD = (
    "work",
    "GPUs",
    *(f"{part}, ms" for part in PARTS),
    *(f"{method.title}, s a video (x one)" for method in epoch_cost.METHODS),
    "peak GiB",
)
PARTS_RULE = "|---|---|" + "--:|" * (len(PARTS_HEAD) - 2)


def table(results: dict[str, dict]) -> str:
    """Return a Markdown table with a row for each number of GPUs, one of the works of steps and one of
    those of parts.

    Below them are the ratios of the first update, devices and software, and failures.
    """
    lines, notes = {"full_size": list[str](), "parts": list[str]()}, set()
    for name in (name for name in WORKS if name in results):
        work, found = WORKS[name], results[name]
        records = {int(n): Record.from_dict(v) for n, v in found.items() if "failed" not in v}
        format_row = parts_row if work.module == "parts" else row
        lines[work.module] += [format_row(work, records, n) for n in sorted(records)]
        notes |= {
            f"- {work.title}, {n} GPUs: failed, {v['failed']}"
            for n, v in found.items()
            if "failed" in v
        }
        notes |= {
            f"- {work.title}, {n} GPUs: ratio of the first update {format_ratio(record.ratio)}"
            for n, record in records.items()
            if record.ratio
        }
        notes |= {f"- {r.device}, {r.software}" for r in records.values()}
    tables = []
    for module, head, rule in (("full_size", HEAD, RULE), ("parts", PARTS_HEAD, PARTS_RULE)):
        if lines[module]:
            tables += ["| " + " | ".join(head) + " |", rule, *lines[module], ""]
    return "\n".join([*tables, *sorted(notes)])


def measured(names: list[str], devices: list[str]) -> list[tuple[str, int]]:
    """Return (work, number of GPUs) of all runs. Raises ValueError without any."""
    runs = [(name, n) for name in names for n in WORKS[name].devices if str(n) in devices]
    if not runs:
        known = {n for name in names for n in WORKS[name].devices}
        raise ValueError(
            f"--devices={','.join(devices)}: these works are measured on "
            f"{', '.join(map(str, sorted(known)))} GPUs"
        )
    return runs


def main(_):
    settings = flags.FLAGS
    try:
        runs = measured(settings.works, settings.devices)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    folder = pathlib.Path(settings.out).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    path, record = folder / "results.json", folder / "record.json"
    results = json.loads(path.read_text()) if path.is_file() else {}
    end = time.monotonic() + settings.limit
    for name, devices in runs:
        record.unlink(missing_ok=True)
        failed = run(
            WORKS[name].command(devices, f"--json={record}"), folder, end - time.monotonic()
        )
        results.setdefault(name, {})[str(devices)] = (
            {"failed": failed} if failed else json.loads(record.read_text())
        )
        path.write_text(json.dumps(results, indent=2) + "\n")
    print(table(results))


if __name__ == "__main__":
    flags.DEFINE_string("out", None, "folder of results.json", required=True)
    steps = [name for name, work in WORKS.items() if work.module == "full_size"]
    flags.DEFINE_list("works", [name for name in steps if name != "tiny-data"], "works to measure")
    flags.DEFINE_list("devices", ["1", "2", "4"], "numbers of GPUs")
    flags.DEFINE_float("limit", 900, "seconds for all of them")
    flags.register_validator(
        "works", lambda names: set(names) <= set(WORKS), f"known works: {', '.join(WORKS)}"
    )
    app.run(main)

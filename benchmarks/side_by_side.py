"""Ours beside the PyTorch peer on the same GPU: a process for each side of each work, one after the
other.

    python -m benchmarks.side_by_side --out build/side_by_side [--works 1.3b-image,14b-image]
    [--sides ours,autocast]

Every process measures alone on the GPU and writes its figures; OUT/results.json is written after
each, and a second call with other works or sides adds to it. `--works=` alone prints the table
again. The peer's modes are those of `benchmarks.peer`; `bf16-compile-cudnn` also takes cuDNN's
attention. The best peer of a stage is its fastest one. A work has --limit seconds for all its
processes. Before the works that decode, ours runs once for XLA's search for convolutions: its
scratch memory is not what decoding takes, and the programs found are kept in OUT/compiled.

`ours-block` computes whole blocks again in the backward pass, as the peer does; `ours` keeps the
dense layers' results, as training does where they fit. Ratios are the peer's time over ours. MFU is
of the nominal 989 TFLOP/s; the bars' MFU is of the 790 that a large bf16 product reached on an
H200, as they were set. An epoch's figures are of one video.
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time

from absl import app, flags

from benchmarks.workload import MEASURED, NOMINAL, Record, Stage

PEERS = {
    "autocast": "--mode=autocast",
    "bf16": "--mode=bf16",
    "bf16-compile": "--mode=bf16-compile",
    "bf16-compile-cudnn": "--mode=bf16-compile --attention=_native_cudnn",
}
OURS = {"ours": "", "ours-block": "--remat=block"}
SIDES = (*OURS, *PEERS)


@dataclasses.dataclass(frozen=True)
class Bar:
    """What a stage is to reach: a ratio to a peer ('autocast' or 'best'), an 'mfu', or 'memory', at
    most the leanest peer's.
    """

    stage: str
    kind: str
    least: float = 1.0


@dataclasses.dataclass(frozen=True)
class Work:
    title: str
    module: str  # ours
    task: str  # the peer's
    shape: str  # arguments of both
    stages: tuple[str, ...]
    peers: tuple[str, ...]  # in the order they run in
    bars: tuple[Bar, ...]
    ours: str = ""  # arguments of ours alone
    search: str | None = None  # arguments of a first run of ours, for XLA's search
    own: tuple[str, ...] = ("ours",)  # of OURS


IMAGE = "--height=512 --width=512 --frames=1 --batch=9"
DECODE = "--height=480 --width=832 --frames=81 --batch=1 --repeats=3"
STEPS = ("rollout", "update")
MEMORY = tuple(Bar(stage, "memory") for stage in STEPS)
UPDATE = Bar("update", "autocast", 2.2), Bar("update", "best", 2.0), Bar("update", "mfu", 0.60)
WORKS = {
    "1.3b-image": Work(
        "1.3B, 9 x 1 x 512 x 512",
        "full_size",
        "steps",
        f"--size=1.3b {IMAGE}",
        STEPS,
        tuple(PEERS),
        (
            Bar("rollout", "autocast", 2.5),
            Bar("rollout", "best", 2.0),
            Bar("rollout", "mfu", 0.65),
            *UPDATE,
            *MEMORY,
        ),
        own=tuple(OURS),
    ),
    "1.3b-clip": Work(
        "1.3B, 8 x 33 x 240 x 416",
        "full_size",
        "steps",
        "--size=1.3b --height=240 --width=416 --frames=33 --batch=8",
        STEPS,
        tuple(PEERS),
        (*UPDATE, *MEMORY),
        own=tuple(OURS),
    ),
    "14b-image": Work(
        "14B, 9 x 1 x 512 x 512",
        "full_size",
        "steps",
        f"--size=14b {IMAGE}",
        STEPS,
        ("bf16", "bf16-compile", "bf16-compile-cudnn", "autocast"),
        (
            Bar("rollout", "best", 1.6),
            Bar("rollout", "mfu", 0.78),
            Bar("update", "best", 1.6),
            Bar("update", "mfu", 0.78),
            *MEMORY,
        ),
        own=tuple(OURS),
    ),
    "decode": Work(
        "VAE in fp32, 1 x 81 x 480 x 832",
        "decode",
        "decode",
        DECODE,
        ("decode",),
        ("autocast",),
        (Bar("decode", "best", 2.0), Bar("decode", "memory")),
        "--dtype=float32",
        "--dtype=float32",
    ),
    "decode-bf16": Work(
        "VAE in bf16, 1 x 81 x 480 x 832",
        "decode",
        "decode",
        DECODE,
        ("decode",),
        ("bf16",),
        (Bar("decode", "best", 2.0), Bar("decode", "memory")),
        "--dtype=bfloat16",
        "--dtype=bfloat16",
    ),
    "epoch": Work(
        "1.3B, epoch of 3 x 12 x 1 x 512 x 512",
        "epoch",
        "epoch",
        f"--size=1.3b {IMAGE} --guidance=4.5 --kl=0.004 --groups=3 --group_size=12",
        ("epoch", "sample", "decode", "score wait", "update"),
        ("autocast", "bf16-compile", "bf16"),
        (Bar("epoch", "autocast", 3.0), Bar("epoch", "memory")),
        "",
        "--group_size=3 --updates=1 --steps=2 --trained=1 --epochs=1",
    ),
}


def command(work: Work, side: str, *extra: str) -> list[str]:
    """Of one side of a work; later arguments win."""
    if side in OURS:
        arguments = [
            f"benchmarks.{work.module}",
            *work.shape.split(),
            *work.ours.split(),
            *OURS[side].split(),
        ]
    else:
        arguments = [
            "benchmarks.peer",
            f"--task={work.task}",
            *PEERS[side].split(),
            *work.shape.split(),
        ]
    return [sys.executable, "-m", *arguments, *extra]


def run(arguments: list[str], folder: pathlib.Path, seconds: float) -> str | None:
    """Runs a process of at most so many seconds; its output is shown. Returns what went wrong."""
    print("---", *arguments[1:], flush=True)
    kept = {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    if seconds <= 0:
        return "no time left"
    try:
        done = subprocess.run(
            arguments,
            env=os.environ | kept,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        return f"took longer than the {seconds:.0f} s left"
    print(done.stdout[-3000:], flush=True)
    lines = done.stdout.strip().splitlines()
    return (
        None
        if done.returncode == 0
        else f"exit code {done.returncode}: {lines[-1][:200] if lines else ''}"
    )


def measure(
    work: Work, sides: list[str], folder: pathlib.Path, limit: float, found: dict, write
) -> None:
    """Adds {side: record, or {'failed': why}} to `found`, and calls `write` after each."""
    end, file = time.monotonic() + limit, folder / "record.json"
    for side in (s for s in (*work.own, *work.peers) if s in sides):
        if side == work.own[0] and work.search is not None:
            run(
                command(work, side, *work.search.split(), "--repeats=1"),
                folder,
                end - time.monotonic(),
            )
        file.unlink(missing_ok=True)
        failed = run(command(work, side, f"--json={file}"), folder, end - time.monotonic())
        found[side] = {"failed": failed} if failed else json.loads(file.read_text())
        write()


# ---- the table -----------------------------------------------------------------------------------
def best_peer(records: dict[str, Record], stage: str) -> str | None:
    """The fastest peer's side."""
    peers = [side for side in records if side not in OURS]
    return min(peers, key=lambda side: records[side].stages[stage].ms, default=None)


def ratio(records: dict[str, Record], stage: str, kind: str, own: str = "ours") -> float | None:
    """The peer's time over ours; None where a side was not measured."""
    side = best_peer(records, stage) if kind == "best" else kind
    if own not in records or side not in records:
        return None
    return records[side].stages[stage].ms / records[own].stages[stage].ms


def leanest(records: dict[str, Record], stage: str) -> tuple[float, str] | None:
    """The least peak memory of a peer, and whose."""
    peaks = [(r.stages[stage].peak_gib, side) for side, r in records.items() if side not in OURS]
    return min((p for p in peaks if p[0] is not None), default=None)


def judge(records: dict[str, Record], bar: Bar, peers: tuple[str, ...], own: str = "ours") -> str:
    """'2.5x autocast: 2.61, reached'; 'not measured' where a figure is missing.

    peers: the work's; 'best' needs one in bf16 where the work has one.
    """
    if bar.kind == "best" and "bf16" in peers and not records.keys() & (set(PEERS) - {"autocast"}):
        return f"{bar.least:g}x best: no peer in bf16 was measured"
    ours = records[own].stages[bar.stage] if own in records else None
    if bar.kind == "memory":
        limit, value = leanest(records, bar.stage), ours and ours.peak_gib
        if limit is None or value is None:
            return "memory: not measured"
        return f"memory at most {limit[0]:.1f} GiB ({limit[1]}): {value:.1f}, {verdict(value <= limit[0])}"
    name = f"MFU {bar.least:.2f}" if bar.kind == "mfu" else f"{bar.least:g}x {bar.kind}"
    value = (
        ours and ours.mfu(MEASURED)
        if bar.kind == "mfu"
        else ratio(records, bar.stage, bar.kind, own)
    )
    return (
        f"{name}: not measured"
        if value is None
        else f"{name}: {value:.2f}, {verdict(value >= bar.least)}"
    )


def verdict(reached: bool) -> str:
    return "reached" if reached else "**not reached**"


def row(work: Work, stage: str, records: dict[str, Record], own: str) -> str:
    best = best_peer(records, stage)
    ours, autocast, fastest = (
        records[side].stages[stage] if side in records else None for side in (own, "autocast", best)
    )

    def shown(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    def peak(stage: Stage | None) -> str:
        return shown(stage and stage.peak_gib, ".1f")

    mfu = [ours.mfu(peak) if ours and ours.tflops else None for peak in (NOMINAL, MEASURED)]
    bars = "; ".join(
        judge(records, bar, work.peers, own) for bar in work.bars if bar.stage == stage
    )
    name = stage if own == "ours" else f"{stage}, {own}"
    cells = [
        work.title,
        name,
        shown(ours and ours.ms, ".1f"),
        shown(autocast and autocast.ms, ".1f"),
        f"{fastest.ms:.1f} ({best})" if fastest else "",
        shown(ratio(records, stage, "autocast", own), ".2f"),
        shown(ratio(records, stage, "best", own), ".2f"),
        *(shown(x, ".2f") for x in mfu),
        peak(ours),
        peak(autocast),
        peak(fastest),
        bars,
    ]
    return "| " + " | ".join(cells) + " |"


HEAD = (
    "work",
    "stage",
    "ours, ms",
    "peer autocast, ms",
    "best peer, ms",
    "x autocast",
    "x best",
    f"MFU of {NOMINAL:.0f}",
    f"MFU of {MEASURED:.0f}",
    "peak GiB, ours",
    "autocast",
    "best",
    "bars",
)


def table(results: dict[str, dict]) -> str:
    """Markdown: a row for each stage, then each side's device, software, first ratio, or why it
    failed.
    """
    lines, notes = ["| " + " | ".join(HEAD) + " |", "|---|---|" + "--:|" * 10 + "---|"], []
    for name in (name for name in WORKS if name in results):
        work = WORKS[name]
        records = {
            side: Record.from_dict(v) for side, v in results[name].items() if "failed" not in v
        }
        lines += [
            row(work, stage, records, own)
            for own in work.own
            for stage in work.stages
            if own in records or (records and own == "ours")
        ]
        for side, values in results[name].items():
            if "failed" in values:
                notes.append(f"- {work.title}, {side}: failed, {values['failed']}")
            elif records[side].ratio:
                least, most = records[side].ratio
                notes.append(
                    f"- {work.title}, {side}: first update's ratio {least:.7f} to {most:.7f}"
                )
    software = {
        f"{r['device']}, {r['software']}"
        for sides in results.values()
        for r in sides.values()
        if "device" in r
    }
    return "\n".join([*lines, "", *notes, *(f"- {x}" for x in sorted(software))])


def main(_):
    f = flags.FLAGS
    folder = pathlib.Path(f.out).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "results.json"
    results = json.loads(path.read_text()) if path.is_file() else {}

    def write():
        path.write_text(json.dumps(results, indent=2) + "\n")

    for name in f.works:
        measure(WORKS[name], f.sides, folder, f.limit, results.setdefault(name, {}), write)
    print(table(results))


if __name__ == "__main__":
    flags.DEFINE_string("out", None, "folder of results.json", required=True)
    flags.DEFINE_list("works", list(WORKS), "which works")
    flags.DEFINE_list("sides", list(SIDES), "ours and the peer's modes")
    flags.DEFINE_float("limit", 900, "seconds a work")
    flags.register_validator(
        "works", lambda names: set(names) <= set(WORKS), f"known are {', '.join(WORKS)}"
    )
    flags.register_validator(
        "sides", lambda names: set(names) <= set(SIDES), f"known are {', '.join(SIDES)}"
    )
    app.run(main)

"""Compares this project with PyTorch on the same GPU, by a process for each side of each work.

    python -m benchmarks.side_by_side --out build/side_by_side
    python -m benchmarks.side_by_side --out build/side_by_side --works 1.3b-image --sides ours
    python -m benchmarks.side_by_side --out build/side_by_side --works=      # print the table again

The processes run one after the other, each alone on the GPU. OUT/results.json is written after each
of them, and a second call with other works or sides adds to it. The modes of the peer, the PyTorch
side, are those of `benchmarks.peer`; `bf16-compile-cudnn` also uses cuDNN's attention. The best
peer of a stage is the fastest one. All processes of a work together have `--limit` seconds. Works
that decode run once before they are measured: XLA then searches for the fastest convolutions, whose
scratch memory does not belong to decoding, and the compiled functions are kept in OUT/compiled. JAX
may use 95 % of the GPU instead of its usual 75.

`ours-block` rematerialises (recomputes) whole blocks in the backward pass, as the peer does; `ours`
keeps the dense layers' results, as training does if they fit. Ratios are the peer's time over ours.
The table has the MFU of the nominal 989 TFLOP/s, and of the 790 that a large bf16 product reached
on an H200, which the targets refer to. The figures of an epoch are those of one video. Where works
NAME-parts were measured, a second table adds their parts up to epochs (`benchmarks.epoch_cost`).
"""

import json
import os
import pathlib
import subprocess
import sys
import time

from absl import app, flags

from benchmarks import epoch_cost
from benchmarks.comparison_works import OURS, PEERS, SIDES, WORKS, Target, Work
from benchmarks.workload import MEASURED, NOMINAL, Record, Stage

MEMORY = "XLA_PYTHON_CLIENT_MEM_FRACTION"


def command(work: Work, side: str, *extra: str) -> list[str]:
    """Return the command of one side of a work; later arguments take precedence."""
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
    """Run a process for at most `seconds` and show its output. Returns the error, or None."""
    print("---", *arguments[1:], flush=True)
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    if seconds <= 0:
        return "no time left"
    try:
        done = subprocess.run(
            arguments,
            env={MEMORY: "0.95"} | os.environ | cache,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        return f"took longer than the {seconds:.0f} s left"
    print(done.stdout[-3000:], flush=True)
    if done.returncode == 0:
        return None
    lines = done.stdout.strip().splitlines()
    return f"exit code {done.returncode}: {lines[-1][:200] if lines else ''}"


def measure(
    work: Work, sides: list[str], folder: pathlib.Path, limit: float, found: dict, write
) -> None:
    """Add {side: record or {'failed': error}} to `found`, and call `write` after each side."""
    end, file = time.monotonic() + limit, folder / "record.json"
    for side in (side for side in (*work.own, *work.peers) if side in sides):
        failed = None
        if side == work.own[0] and work.search is not None:
            search = command(work, side, *work.search.split(), "--repeats=1")
            failed = run(search, folder, end - time.monotonic())
        if failed:  # the scratch memory of a later search would count as that of decoding
            found[side] = {"failed": f"the search before it: {failed}"}
            write()
            continue
        file.unlink(missing_ok=True)
        failed = run(command(work, side, f"--json={file}"), folder, end - time.monotonic())
        found[side] = {"failed": failed} if failed else json.loads(file.read_text())
        write()


# ---- table ---------------------------------------------------------------------------------------
def best_peer(records: dict[str, Record], stage: str) -> str | None:
    """Return the fastest peer of a stage, or None if no peer was measured."""
    peers = [side for side in records if side not in OURS]
    return min(peers, key=lambda side: records[side].stages[stage].ms, default=None)


def ratio(records: dict[str, Record], stage: str, kind: str, own: str = "ours") -> float | None:
    """Return the peer's time over ours, or None if either was not measured."""
    side = best_peer(records, stage) if kind == "best" else kind
    if side is None or own not in records or side not in records:
        return None
    return records[side].stages[stage].ms / records[own].stages[stage].ms


def leanest(records: dict[str, Record], stage: str) -> tuple[float, str] | None:
    """Return the smallest peak memory of a peer and the peer, or None if none was measured."""
    peaks = [
        (record.stages[stage].peak_gib or 0.0, side)
        for side, record in records.items()
        if side not in OURS and record.stages[stage].peak_gib is not None
    ]
    return min(peaks, default=None)


def judge(
    records: dict[str, Record], target: Target, peers: tuple[str, ...], own: str = "ours"
) -> str:
    """Return a sentence such as '2.5x autocast: 2.61, reached', or '...: not measured'.

    peers: those of the work; if it has one in bf16, 'best' needs a measured one in bf16.
    """
    in_bf16 = records.keys() & (set(PEERS) - {"autocast"})
    if target.kind == "best" and "bf16" in peers and not in_bf16:
        return f"{target.least:g}x best: no peer in bf16 was measured"
    ours = records[own].stages[target.stage] if own in records else None
    if target.kind == "memory":
        limit = leanest(records, target.stage)
        if limit is None or ours is None or ours.peak_gib is None:
            return "memory: not measured"
        reached = verdict(ours.peak_gib <= limit[0])
        return f"memory at most {limit[0]:.1f} GiB ({limit[1]}): {ours.peak_gib:.1f}, {reached}"
    if target.kind == "mfu":
        name, value = f"MFU {target.least:.2f}", ours.mfu(MEASURED) if ours else None
    else:
        name = f"{target.least:g}x {target.kind}"
        value = ratio(records, target.stage, target.kind, own)
    if value is None:
        return f"{name}: not measured"
    return f"{name}: {value:.2f}, {verdict(value >= target.least)}"


def verdict(reached: bool) -> str:
    """Return a target's result in words."""
    return "reached" if reached else "**not reached**"


def format_ratio(ratio: tuple[float, float]) -> str:
    """Return a range of ratios in words."""
    return f"{ratio[0]:.7f} to {ratio[1]:.7f}"


def row(work: Work, stage: str, records: dict[str, Record], own: str) -> str:
    """Return the row of one stage of one of our variants."""
    best = best_peer(records, stage)
    ours, autocast, fastest = (
        records[side].stages[stage] if side is not None and side in records else None
        for side in (own, "autocast", best)
    )

    def cell(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    def milliseconds(measured: Stage | None) -> str:
        return "" if measured is None else f"{measured.ms:.1f}"

    def peak(measured: Stage | None) -> str:
        return "" if measured is None else cell(measured.peak_gib, ".1f")

    mfu = [ours.mfu(rate) if ours else None for rate in (NOMINAL, MEASURED)]
    targets = "; ".join(
        judge(records, target, work.peers, own) for target in work.targets if target.stage == stage
    )
    name = stage if own == "ours" else f"{stage}, {own}"
    cells = [
        work.title,
        name,
        milliseconds(ours),
        milliseconds(autocast),
        f"{fastest.ms:.1f} ({best})" if fastest else "",
        cell(ratio(records, stage, "autocast", own), ".2f"),
        cell(ratio(records, stage, "best", own), ".2f"),
        *(cell(value, ".2f") for value in mfu),
        peak(ours),
        peak(autocast),
        peak(fastest),
        targets,
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
    "targets",
)


def table(results: dict[str, dict]) -> str:
    """Return a Markdown table with a row for each stage.

    Below it are the ratios of the first update or the errors of each side, devices and software.
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
            elif first := records[side].ratio:
                notes.append(
                    f"- {work.title}, {side}: ratio of the first update {format_ratio(first)}"
                )
    software = {
        f"{record['device']}, {record['software']}"
        for sides in results.values()
        for record in sides.values()
        if "device" in record
    }
    return "\n".join([*lines, "", *notes, *(f"- {name}" for name in sorted(software))])


def main(_):
    settings = flags.FLAGS
    folder = pathlib.Path(settings.out).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "results.json"
    results = json.loads(path.read_text()) if path.is_file() else {}

    def write():
        path.write_text(json.dumps(results, indent=2) + "\n")

    for name in settings.works:
        measure(
            WORKS[name], settings.sides, folder, settings.limit, results.setdefault(name, {}), write
        )
    print(table(results))
    print(epoch_cost.table(results))


if __name__ == "__main__":
    flags.DEFINE_string("out", None, "folder of results.json", required=True)
    flags.DEFINE_list("works", list(WORKS), "works to measure")
    flags.DEFINE_list("sides", list(SIDES), "our variants and the modes of the peer")
    flags.DEFINE_float("limit", 900, "seconds for each work")
    flags.register_validator(
        "works", lambda names: set(names) <= set(WORKS), f"known works: {', '.join(WORKS)}"
    )
    flags.register_validator(
        "sides", lambda names: set(names) <= set(SIDES), f"known sides: {', '.join(SIDES)}"
    )
    app.run(main)

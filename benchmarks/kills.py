"""Kills a small training run, fills and blocks its disk, and checks that the same command continues it bit for bit.

    python -m benchmarks.kills [--kills=16] [--disks=8] [--seed=0]

Each run is the command grpo.train on a random tiny model, in processes of its own. It is killed by SIGKILL at stages
and at random instants; its disk, a small tmpfs, fills up or is read-only (skipped where mounting is not allowed, it
needs root); files and folders stand in the way of what it writes; and its folder is moved away.

A few faults in a row hit the same run, and each time the same command continues it. A fault has SURVIVED if the command
named it in one message (a killed one cannot) without a traceback, and if the run in the end equals an undisturbed one:
every array of the last checkpoint, all metrics and all evaluations, without clocks and memory. LOST counts epochs that
a checkpoint held and that were trained again, SILENT the faults of runs that ended well and differ. The exit code is 1
unless all faults survive and nothing is lost.
"""

import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np
from absl import flags

from convert.from_diffusers import convert
from grpo import run_log
from tests import commands, tiny
from wan_jax import cli
from wan_jax.checkpoint import read_numpy

SETTINGS = """epochs=6 model.dtype=float32 model.remat=none lora.rank=4 save.every=1 reward.workers=0 train.method=grpo
sample.height=16 sample.width=32 sample.guidance=1.0 sample.steps=3 sample.sde_steps=2 sample.sde_range=(0,3)
sample.groups=2 sample.group_size=4 sample.batch_size=4 train.updates_per_epoch=2 train.advantage_std=global
eval.every=2 eval.num_prompts=4 eval.steps=2 eval.guidance=1.0 eval.previews=2 reward.weights.sharpness=1.0
reward.weights.exposure=1.0 reward.weights.contrast=1.0""".split()  # nothing can be read in a random model's videos
WORDS = {"train": "open exit cafe salt", "heldout": "moon tide fern lamp"}
QUICK = " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
               "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
CLOCKS = re.compile(r"(.*/)?(time|peak_memory|idle_share|\w*seconds)(/.*)?")  # keys of what differs between runs
PATIENCE = 120.0  # seconds for one command
TRACEBACK = "Traceback (most recent call last)"
OBSTACLES = {"a file": (".", "checkpoints", "tensorboard", "previews", "side_by_side"),
             "a folder": ("metrics.jsonl", "evals.jsonl", "config.json", "report.html")}

COLUMNS = ("tried", "survived", "lost", "silent", "tracebacks")
Watch = Callable[[str, pathlib.Path], bool]  # whether the output so far and the run's folder show that it is time


def saving(first: int, last: int) -> Watch:
    """Watch for a checkpoint that is being written."""
    return lambda out, run: any((run / f"checkpoints/.{epoch}.tmp").exists() for epoch in range(first, last + 1))


STAGES: dict[str, Watch] = {  # in the order of a run
    "compiling": lambda out, run: "rematerialisation: " in out,
    "the first save": saving(0, 0),
    "the first evaluation": lambda out, run: (run / "checkpoints/0").exists() and "trained parameters" in out,
    "an epoch": lambda out, run: "epoch 1/" in out and (run / "checkpoints/1").exists(),
    "resuming": lambda out, run: "continuing " in out,
    "a save": saving(1, 3),
    "an evaluation": lambda out, run: (run / "checkpoints/4").exists() and "epoch 4: " not in out,
    "a late save": saving(5, 6),
    "the report": lambda out, run: "peak memory: " in out,
}


@dataclasses.dataclass
class Chain:
    """A run that suffers several faults, which are counted in `rows` by their kinds."""

    settings: list[str]
    run: pathlib.Path
    rows: dict[str, collections.Counter]
    faults: list[tuple[str, bool]] = dataclasses.field(default_factory=list)  # (kind, whether it was taken well)
    saved: int = 0  # the newest checkpoint at the last fault

    def start(self, watch: Watch | None = None, act: Callable | None = None) -> tuple[int, str, bool]:
        """Run the command, and `act` on its process as soon as `watch` says so. Returns (exit code, what it printed on
        standard error, whether `act` was called)."""
        command = commands.command("grpo.train", *self.settings, f"--config.run_dir={self.run}")
        acted, deadline = False, time.monotonic() + PATIENCE
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            process = subprocess.Popen(command, env=commands.environment(), stdout=out, stderr=err)
            while process.poll() is None:
                if act and not acted and watch(os.pread(out.fileno(), 2**20, 0).decode(), self.run):
                    while (pid := commands.process_id(process)) == process.pid and commands.SERVER:
                        time.sleep(0.001)  # until the command server has told its number
                    act(pid)
                    acted = True
                if time.monotonic() > deadline:
                    os.kill(commands.process_id(process), signal.SIGKILL)
                time.sleep(0.02 if acted or act is None else 0.0005)
            said, errors = (os.pread(file.fileno(), 2**24, 0).decode(errors="replace") for file in (out, err))
        continued = re.search(r"(?:continuing .* after epoch (\d+)|trained parameters)", said)
        if continued and self.faults:
            self.rows[self.faults[-1][0]]["lost"] += max(0, self.saved - int(continued[1] or 0))
        folders = (self.run / "checkpoints").glob("*")
        self.saved = max((int(path.name) for path in folders if path.name.isdecimal()), default=self.saved)
        return process.returncode, errors, acted

    def note(self, kind: str, wrong: str, errors: str) -> None:
        """Note a fault. wrong: about how the command took it."""
        self.rows[kind]["tracebacks"] += TRACEBACK in errors
        if wrong or TRACEBACK in errors:
            print(f"{kind}: {wrong}", *errors.splitlines()[-40:], sep="\n    ", flush=True)
        self.faults.append((kind, not wrong and TRACEBACK not in errors))

    def kill(self, kind: str, watch: Watch) -> None:
        code, errors, acted = self.start(watch, lambda pid: os.kill(pid, signal.SIGKILL))
        if acted and code != 0:
            self.note(kind, "", errors)

    def refuse(self, kind: str, watch: Watch | None = None, act: Callable | None = None) -> None:
        """Run the command in a fault, which it must name in one message; not counted where the fault came too late."""
        code, errors, _ = self.start(watch, act)
        if code != 0:
            messages = sum(line.startswith("error: ") for line in errors.splitlines())
            wrong = "" if (code, messages) == (1, 1) else f"exit code {code}, {messages} messages"
            self.note(kind, wrong, errors)

    def finish(self, wanted: dict) -> None:
        """Let the run end, and compare it with the undisturbed one."""
        code, errors, _ = self.start()
        wrong = difference(wanted, result(self.run)) if code == 0 else f"exit code {code}"
        print(f"{self.run.name}, {len(self.faults)} faults: {wrong or 'equal in the end'}", flush=True)
        if wrong or TRACEBACK in errors:
            print(errors, flush=True)
        for kind, well in self.faults:
            self.rows[kind] += collections.Counter(
                tried=1, survived=well and not wrong and TRACEBACK not in errors, silent=bool(wrong) and code == 0)


def result(run: pathlib.Path) -> dict:
    """Return everything that a run computed: {name: array or value}."""
    epoch = max(int(path.name) for path in (run / "checkpoints").glob("*") if path.name.isdecimal())
    found = {"epoch": epoch}
    for item in ("state", "trained"):
        tree = read_numpy(run / "checkpoints" / str(epoch) / item)
        found |= {item + jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    for name in (run_log.METRICS, run_log.EVALUATIONS):
        for i, line in enumerate((run / name).read_text().splitlines(), 1):
            values = run_log.flatten(json.loads(line)).items()
            found |= {f"{name} line {i}: {key}": value for key, value in values if not CLOCKS.fullmatch(key)}
    return found


def difference(a: dict, b: dict) -> str:
    """Name what differs between two results, to the bit; '' if nothing does."""
    def bits(value):
        array = np.asarray(value)
        return array.dtype, array.shape, array.tobytes()

    names = [key for key in a | b if key not in a or key not in b or bits(a[key]) != bits(b[key])]
    return f"{len(names)} differ, first {names[0]}" if names else ""


@contextlib.contextmanager
def tmpfs(folder: pathlib.Path) -> Iterator[Callable[[str], None]]:
    """Mount a disk on the folder; yields a function that mounts it again with other options."""
    def mount(options: str) -> None:
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "kills", folder], check=True, capture_output=True)

    folder.mkdir()
    mount("size=1m")
    try:
        yield lambda options: mount(f"remount,{options}")
    finally:
        subprocess.run(["umount", "-l", folder], check=False)


def kill_runs(chain: Callable[[str], Chain], kills: int, seconds: float, seed: int, wanted: dict) -> None:
    """Kill one run at three stages, another one up to three times at instants of its `seconds`, and so on."""
    rng, stages, tried = random.Random(seed), collections.deque(STAGES), 0
    while tried < kills:
        aimed, other = chain(f"killed {tried}"), chain(f"killed {tried}, at random")
        for stage in list(stages)[:3]:
            aimed.kill(f"SIGKILL in {stage}", STAGES[stage])
        stages.rotate(-3)
        for _ in range(3):
            instant = time.monotonic() + rng.uniform(0, 0.8 * seconds)
            other.kill("SIGKILL at a random instant", lambda out, run, at=instant: time.monotonic() >= at)
        for run in (aimed, other):
            run.finish(wanted)
            tried += len(run.faults)


def fill_disks(chain: Callable[[str], Chain], disks: int, size: int, wanted: dict) -> None:
    """Let the disk of a run fill up and enlarge it, again and again, up to `size`, the bytes of an undisturbed run."""
    full, read_only = chain("full disk/run"), chain("read-only disk/run")
    with tmpfs(full.run.parent) as remount:
        for i in range(disks):
            remount(f"size={int(size / 1024 * (i + 0.5) / disks)}k")
            full.refuse("a full disk")
        remount(f"size={size * 4 // 1024}k")
        full.finish(wanted)
    with tmpfs(read_only.run.parent) as remount:
        for stage in ("the first evaluation", "an epoch"):
            remount("ro")
            read_only.refuse("a read-only disk")
            remount(f"rw,size={size * 4 // 1024}k")
            read_only.kill(f"SIGKILL in {stage}", STAGES[stage])
        read_only.finish(wanted)


def block(chain: Callable[[str], Chain], wanted: dict) -> None:
    """Put files and folders in the way of a run, and move another one's folder away."""
    blocked, moved = chain("blocked"), chain("moved")
    for what, names in OBSTACLES.items():
        for name in names:
            path, aside = blocked.run / name, blocked.run.with_name("aside")
            if path.exists():
                path.rename(aside)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("not ours") if what == "a file" else path.mkdir()
            blocked.refuse(f"{what} in the way of {'the run folder' if name == '.' else name}")
            path.unlink() if what == "a file" else path.rmdir()
            if aside.exists():
                aside.rename(path)
    blocked.finish(wanted)
    elsewhere = moved.run.with_name("elsewhere")
    for stage in ("compiling", "the first evaluation", "a save", "the report"):
        moved.refuse("run folder moved away", STAGES[stage], lambda pid: moved.run.rename(elsewhere))
        if elsewhere.exists():
            elsewhere.rename(moved.run)
    moved.finish(wanted)


def main(_) -> None:
    rows: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    with tempfile.TemporaryDirectory(prefix="kills-") as name:
        folder = pathlib.Path(name)
        os.environ |= ENVIRONMENT | {"XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + QUICK}
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "compiled"))
        convert(str(tiny.write_pipeline(folder / "source", seed=3)), folder / "model", "float32")
        settings = [*SETTINGS, f"model.path={folder}/model"]
        for part, words in WORDS.items():
            (folder / part).write_text("".join(f'A sign that says "{word}".\n' for word in words.split()))
            settings.append(f"prompts.{part}={folder}/{part}")

        def chain(name: str) -> Chain:
            values = ["--config=configs/tiny_ocr.py", *(f"--config.{setting}" for setting in settings)]
            return Chain(values, folder / name, rows)

        for run in ("first", "whole"):  # the first one fills the cache of compiled functions
            began = time.monotonic()
            code, errors, _ = chain(run).start()
            if code != 0:
                sys.exit(f"an undisturbed run ended with {code}:\n{errors}")
        seconds, wanted = time.monotonic() - began, result(folder / "whole")
        if differs := difference(wanted, result(folder / "first")):
            sys.exit(f"two undisturbed runs differ: {differs}")
        size = sum(path.lstat().st_blocks * 512 for path in (folder / "whole").rglob("*"))
        print(f"undisturbed: {seconds:.0f} s, {size / 1e6:.1f} MB, {len(wanted)} arrays and values", flush=True)
        kill_runs(chain, flags.FLAGS.kills, seconds, flags.FLAGS.seed, wanted)
        try:
            fill_disks(chain, flags.FLAGS.disks, size, wanted)
        except (subprocess.CalledProcessError, FileNotFoundError) as error:
            print(f"skipped: full and read-only disks, which need the right to mount ({error})", flush=True)
        block(chain, wanted)
    print(*table(rows), sep="\n")
    sys.exit(any(row["survived"] < row["tried"] or row["lost"] for row in rows.values()))


def table(rows: dict[str, collections.Counter]) -> list[str]:
    """In Markdown."""
    lines = [f"| fault | {' | '.join(COLUMNS)} |", "|---" * (1 + len(COLUMNS)) + "|"]
    for kind, row in [*rows.items(), ("all", sum(rows.values(), collections.Counter()))]:
        lines.append(f"| {kind} | {' | '.join(str(row[column]) for column in COLUMNS)} |")
    return lines


if __name__ == "__main__":
    flags.DEFINE_integer("kills", 16, "at least so many kills", lower_bound=0)
    flags.DEFINE_integer("disks", 8, "sizes of the disk that fills up", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "of the random instants")
    cli.run(main)

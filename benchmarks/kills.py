"""Kills a small training run, fills and blocks its disk, and checks that the same command continues it bit for bit.

    python -m benchmarks.kills [--kills=16] [--disks=6] [--seed=0]

Every run is the command grpo.train on a random tiny model, in processes of its own. `--kills` times it is killed by
SIGKILL, in turn at a stage of the run and at a random instant. Its disk, a small tmpfs, fills up at `--disks` sizes; it
is read-only; files and folders stand in the way of what the run writes; and the run's folder is moved away. Mounting
needs root: without it, those faults are skipped.

A few faults in a row hit the same run, each time continued by the same command. The fault has SURVIVED if the command
said what is wrong in one clear message (a killed one cannot), if no traceback was printed, and if the run in the end
equals an undisturbed one: every array of the last checkpoint, all metrics and all evaluations, without clocks and
memory. LOST counts the epochs that a checkpoint held and that were trained again; SILENT the faults of runs that ended
with exit code 0 and differ. The exit code is 1 unless all faults survive.
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

RECIPE = """
from configs.defaults import defaults

def get_config():
    c = defaults()
    c.epochs = 6
    c.model.path, c.model.dtype, c.model.remat = {model!r}, "float32", "none"
    c.lora.rank = 4
    c.prompts.train, c.prompts.heldout = {train!r}, {heldout!r}
    c.sample.height, c.sample.width, c.sample.guidance = 16, 32, 1.0
    c.sample.steps, c.sample.sde_steps, c.sample.sde_range = 3, 2, (0, 3)
    c.sample.groups, c.sample.group_size, c.sample.batch_size = 2, 4, 4
    c.train.method, c.train.updates_per_epoch, c.train.advantage_std = "grpo", 2, "global"
    c.eval.every, c.eval.num_prompts, c.eval.steps, c.eval.guidance, c.eval.previews = 2, 4, 2, 1.0, 2
    c.save.every = 1
    c.reward.workers = 0
    for name in ("sharpness", "exposure", "contrast"):  # nothing can be read in a random model's videos
        c.reward.weights[name] = 1.0
    return c
"""
WORDS = "open exit cafe salt moon tide fern lamp".split()
QUICK = ("--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
         "--xla_cpu_parallel_codegen_split_count=1")
CLOCKS = re.compile(r"time|peak_memory|idle_share|seconds|spent_seconds|.*_seconds")  # keys that differ between runs
PATIENCE = 120.0  # seconds for one command
OBSTACLES = {"a file in the way of the run folder": ".", "a file in the way of checkpoints/": "checkpoints",
             "a file in the way of tensorboard/": "tensorboard", "a file in the way of previews/": "previews",
             "a folder in the way of metrics.jsonl": "metrics.jsonl",
             "a folder in the way of report.html": "report.html"}

Watch = Callable[[str, pathlib.Path], bool]  # whether the output so far and the run's folder show that it is time


def saving(first: int, last: int) -> Watch:
    """Watch for a checkpoint that is being written."""
    return lambda out, run: any((run / f"checkpoints/.{epoch}.tmp").exists() for epoch in range(first, last + 1))


# In the order in which a run comes to them; a run that is past one of them ends undisturbed, which is not counted.
STAGES: dict[str, Watch] = {
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
class Row:
    """The counts of one kind of fault."""

    tried: int = 0
    survived: int = 0
    lost: int = 0
    silent: int = 0
    tracebacks: int = 0


@dataclasses.dataclass
class Chain:
    """One run that suffers several faults. faults: the kinds so far, and what was wrong with each ('': nothing)."""

    config: pathlib.Path
    run: pathlib.Path
    rows: dict[str, Row]
    faults: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    saved: int = 0  # the newest checkpoint that was there at the last fault

    def start(self, watch: Watch | None = None, act: Callable[[int], None] = lambda pid: None):
        """Run the command; when `watch` is true, `act` on its process. Returns (exit code, output, errors, acted)."""
        command = commands.command("grpo.train", f"--config={self.config}", f"--config.run_dir={self.run}")
        acted, deadline = False, time.monotonic() + PATIENCE
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            process = subprocess.Popen(command, env=commands.environment(), stdout=out, stderr=err)
            while process.poll() is None and time.monotonic() < deadline:
                if watch and not acted and watch(os.pread(out.fileno(), 2**20, 0).decode(), self.run):
                    while (pid := commands.process_id(process)) == process.pid and commands.SERVER:
                        time.sleep(0.001)  # until the command server has told its number
                    act(pid)
                    acted = True
                time.sleep(0.02 if acted or watch is None else 0.0005)
            if process.poll() is None:
                os.kill(commands.process_id(process), signal.SIGKILL)
            code = process.wait()
            said, errors = (os.pread(file.fileno(), 2**24, 0).decode(errors="replace") for file in (out, err))
        self.count_lost(said)
        return code, said, errors, acted

    def count_lost(self, said: str):
        """Count epochs that a checkpoint held and this command did not continue after."""
        if "trained parameters" in said or "continuing " in said:
            found = re.search(r"continuing .* after epoch (\d+)", said)
            if self.faults and (lost := self.saved - (int(found[1]) if found else 0)) > 0:
                self.rows[self.faults[-1][0]].lost += lost
        there = [int(path.name) for path in (self.run / "checkpoints").glob("*") if path.name.isdecimal()]
        self.saved = max([self.saved, *there])

    def fault(self, kind: str, wrong: str, errors: str):
        """Note a fault, with what is `wrong` about how the command took it."""
        traceback = "Traceback (most recent call last)" in errors
        self.rows.setdefault(kind, Row()).tracebacks += traceback
        if wrong or traceback:
            print(f"{kind}: {wrong or 'a traceback'}\n    " + "\n    ".join(errors.splitlines()[-30:]), flush=True)
        self.faults.append((kind, wrong or "a traceback" * traceback))

    def kill(self, kind: str, watch: Watch):
        code, _, errors, acted = self.start(watch, lambda pid: os.kill(pid, signal.SIGKILL))
        if acted and code != 0:
            self.fault(kind, "", errors)

    def refuse(self, kind: str, watch: Watch | None = None, act: Callable[[int], None] = lambda pid: None):
        """Run the command in a fault, which it must name in one message."""
        code, _, errors, acted = self.start(watch, act)
        if acted or (watch is None and code != 0):
            messages = [line for line in errors.splitlines() if line.startswith("error: ")]
            self.fault(kind, "" if code == 1 and len(messages) == 1 else f"exit code {code}, {len(messages)} messages",
                       errors)

    def finish(self, wanted: dict):
        """Let the run end, and compare it with the undisturbed one."""
        if not self.faults:
            return
        code, _, errors, _ = self.start()
        differs = difference(wanted, result(self.run)) if code == 0 else f"exit code {code}: {errors[-2000:]}"
        if differs or "Traceback (most recent call last)" in errors:
            print(f"a run after {', '.join(kind for kind, _ in self.faults)}: {differs}\n{errors[-2000:]}", flush=True)
        for kind, wrong in self.faults:
            row = self.rows[kind]
            row.tried += 1
            row.survived += not wrong and not differs
            row.silent += bool(differs) and code == 0
        print(f"{self.run.name}: {len(self.faults)} faults, {'DIFFERS' if differs else 'equal in the end'}: "
              f"{', '.join(kind for kind, _ in self.faults)}", flush=True)


def result(run: pathlib.Path) -> dict:
    """Everything that a run computed: {name: array or record}."""
    epoch = max(int(path.name) for path in (run / "checkpoints").glob("*") if path.name.isdecimal())
    found = {"epoch": epoch}
    for item in ("state", "trained"):
        tree = read_numpy(run / "checkpoints" / str(epoch) / item)
        found |= {item + jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    for name in (run_log.METRICS, run_log.EVALUATIONS):
        for i, line in enumerate((run / name).read_text().splitlines()):
            flat = run_log.flatten(json.loads(line))
            found |= {f"{name} line {i + 1}, {key}": value for key, value in flat.items()
                      if not any(CLOCKS.fullmatch(part) for part in key.split("/"))}
    return found


def difference(a: dict, b: dict) -> str:
    """The first key under which the two differ, bit for bit; '' if there is none."""
    for key in [*a, *(b.keys() - a.keys())]:
        if key not in a or key not in b:
            return f"{key} is in one of the two only"
        one, other = np.asarray(a[key]), np.asarray(b[key])
        if one.dtype != other.dtype or one.shape != other.shape or one.tobytes() != other.tobytes():
            return f"{key} differs"
    return ""


@contextlib.contextmanager
def tmpfs(folder: pathlib.Path, kib: int) -> Iterator[Callable[[str], None]]:
    """Mount a disk of so many KiB on the folder; yields a function that mounts it again with other options."""
    def mount(options: str):
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "kills", folder], check=True, capture_output=True)

    folder.mkdir()
    mount(f"size={kib}k")
    try:
        yield lambda options: mount(f"remount,{options}")
    finally:
        subprocess.run(["umount", "-l", folder], check=False)


def kill_runs(chain: Callable[[str], Chain], kills: int, seconds: float, seed: int, wanted: dict):
    """Kill runs; half of the times at a stage, else at an instant within the `seconds` that a whole run takes."""
    rng, stages, tried = random.Random(seed), collections.deque(STAGES), 0
    while tried < kills:
        run = chain(f"killed-{tried}")
        for stage in list(stages)[:3]:  # in the order of a run
            run.kill(f"SIGKILL in {stage}", STAGES[stage])
        stages.rotate(-3)
        run.finish(wanted)
        other = chain(f"killed-{tried}-at-random")
        for _ in range(3):
            instant = time.monotonic() + rng.uniform(0, 0.8 * seconds)
            other.kill("SIGKILL at a random instant", lambda out, run, at=instant: time.monotonic() >= at)
        other.finish(wanted)
        tried += len(run.faults) + len(other.faults)


def fill_disks(chain: Callable[[str], Chain], disks: int, size: int, wanted: dict):
    """Let a disk fill up, enlarge it a little, and again, up to the `size` in bytes of a whole run."""
    run = chain("disk/full")
    sizes = [int(size / 1024 * (i + 0.5) / disks) for i in range(disks)]
    with tmpfs(run.run.parent, sizes[0]) as remount:
        for kib in sizes:
            remount(f"size={kib}k")
            run.refuse("a full disk, then enlarged")
        remount(f"size={size * 4 // 1024}k")
        run.finish(wanted)
    run = chain("read-only/run")
    with tmpfs(run.run.parent, size * 4 // 1024) as remount:
        remount("ro")
        run.refuse("a read-only disk")
        remount("rw")
        run.kill("SIGKILL at a random instant", STAGES["an epoch"])
        remount("ro")
        run.refuse("a read-only disk")
        remount("rw")
        run.finish(wanted)


def block_runs(chain: Callable[[str], Chain], wanted: dict):
    """Put files and folders in the way, and move the run's folder away."""
    run = chain("blocked")
    for kind, name in OBSTACLES.items():
        path, aside = run.run / name, run.run.parent / "aside"
        if path.exists():
            path.rename(aside)
        if "a file" in kind:
            path.write_text("something else")
        else:
            path.mkdir(parents=True)
        run.refuse(kind)
        path.unlink() if path.is_file() else path.rmdir()
        if aside.exists():
            aside.rename(path)
    run.finish(wanted)
    run = chain("moved")
    elsewhere = run.run.with_name("elsewhere")
    for stage in ("compiling", "the first evaluation", "a save", "the report"):
        run.refuse("the run folder moved away", STAGES[stage], lambda pid: run.run.rename(elsewhere))
        if elsewhere.exists():
            elsewhere.rename(run.run)
    run.finish(wanted)


def main(_) -> None:
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK}"
    os.environ.update(JAX_PLATFORMS="cpu", HF_HUB_OFFLINE="1", JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0.2",
                      JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES="-1")
    rows: dict[str, Row] = {}
    with tempfile.TemporaryDirectory(prefix="kills-") as name:
        folder = pathlib.Path(name)
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "compiled"))
        with contextlib.redirect_stdout(None):
            convert(str(tiny.write_pipeline(folder / "source", seed=3)), folder / "model", "float32")
        paths = {"model": str(folder / "model")}
        for part, words in (("train", WORDS[:4]), ("heldout", WORDS[4:])):
            paths[part] = str(folder / f"{part}.txt")
            pathlib.Path(paths[part]).write_text("".join(f'A sign that says "{word}".\n' for word in words))
        (folder / "recipe.py").write_text(RECIPE.format(**paths))

        def chain(name: str) -> Chain:
            return Chain(folder / "recipe.py", folder / name, rows)

        for whole in (chain("warm"), chain("whole")):  # the first one fills the cache of compiled functions
            began = time.monotonic()
            code, out, errors, _ = whole.start()
            seconds = time.monotonic() - began
            if code != 0:
                sys.exit(f"the undisturbed run ended with {code}:\n{out}{errors}")
        wanted = result(whole.run)
        if differs := difference(wanted, result(folder / "warm")):
            sys.exit(f"two undisturbed runs differ: {differs}")
        size = sum(path.lstat().st_blocks * 512 for path in whole.run.rglob("*"))
        print(f"an undisturbed run: {seconds:.0f} s, {size / 1e6:.1f} MB, {len(wanted)} arrays and values", flush=True)
        kill_runs(chain, flags.FLAGS.kills, seconds, flags.FLAGS.seed, wanted)
        try:
            fill_disks(chain, flags.FLAGS.disks, size, wanted)
        except (subprocess.CalledProcessError, FileNotFoundError) as error:
            print(f"full and read-only disks are skipped, mounting is not possible here: {error}", flush=True)
        block_runs(chain, wanted)
    print(*table(rows), sep="\n")
    sys.exit(any(row.survived < row.tried or row.lost for row in rows.values()))


def table(rows: dict[str, Row]) -> list[str]:
    """In Markdown."""
    names = [field.name for field in dataclasses.fields(Row)]
    total = Row(*(sum(getattr(row, name) for row in rows.values()) for name in names))
    lines = [f"| fault | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    return lines + [f"| {kind} | {' | '.join(str(value) for value in dataclasses.astuple(row))} |"
                    for kind, row in [*rows.items(), ("all", total)]]


if __name__ == "__main__":
    flags.DEFINE_integer("kills", 16, "kills; some more are made, so that every run ends", lower_bound=0)
    flags.DEFINE_integer("disks", 6, "sizes of the disk that fills up", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "of the random instants")
    cli.run(main)

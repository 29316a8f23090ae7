"""Kills a small training run, fills and blocks its disk, and checks that it continues bit for bit.

    python -m benchmarks.kills --kills=16 --disks=8 --seed=0

Runs of a random tiny model are killed in given stages and at random instants. Their disk, a small
tmpfs, fills up or becomes read-only (skipped without the right to mount), files and folders take
the names of what they write, and their folder is moved away. A run SURVIVES a fault if the command
names it in one message without a traceback (a killed one cannot), and the run in the end equals an
undisturbed one in the arrays of the last checkpoint, the metrics and the evaluations, except for
times. LOST counts saved epochs that were trained again, SILENT the faults of runs that ended
normally with other results.
"""

import collections
import dataclasses
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import jax
import numpy as np
from absl import flags

from convert.from_diffusers import convert
from grpo.records import json_lines, run_log
from tests import commands, tiny
from wan_jax.command_line import cli
from wan_jax.storage.checkpoint import read_numpy

# the rewards are not only OCR, which finds no text in noise
SMALL = """epochs=6 lora.rank=4 save.every=1 sample.height=16 sample.width=32 sample.guidance=1.0
sample.steps=3 sample.sde_steps=2 sample.sde_range=(0,3) sample.groups=2 sample.group_size=4
sample.batch_size=4 train.method=grpo train.updates_per_epoch=2 train.advantage_std=global
eval.every=2 eval.num_prompts=4 eval.steps=2 eval.guidance=1.0 reward.workers=0
reward.weights.sharpness=1.0 reward.weights.exposure=1.0"""
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
# keys of values that differ between equal runs
CLOCKS = re.compile(r"(.*/)?(time|peak_memory|idle_share|\w*seconds)(/.*)?")
TRACEBACK = "Traceback (most recent call last)"
OBSTACLES = {
    ".": "file",
    "checkpoints": "file",
    "tensorboard": "file",
    "config.json": "folder",
    "previews": "file",
    "evals.jsonl": "folder",
    "metrics.jsonl": "folder",
    "side_by_side": "file",
    "report.html": "folder",
}
COLUMNS = ("tried", "survived", "lost", "silent", "tracebacks")
# returns whether the output so far and the run's folder show that a stage is reached
Watch = Callable[[str, pathlib.Path], bool]

STAGES: dict[str, Watch] = {  # in the order of a run
    "compiling": lambda out, run: "rematerialisation: " in out,
    "the first save": lambda out, run: (run / "checkpoints/.0.tmp").exists(),
    "the first evaluation": lambda out, run: (
        (run / "checkpoints/0").exists() and "trained parameters" in out
    ),
    "an epoch": lambda out, run: "epoch 1/" in out and (run / "checkpoints/1").exists(),
    "resuming": lambda out, run: "continuing " in out,
    "a save": lambda out, run: any(run.glob("checkpoints/.[123].tmp")),
    "an evaluation": lambda out, run: (run / "checkpoints/4").exists() and "epoch 4: " not in out,
    "a late save": lambda out, run: any(run.glob("checkpoints/.[56].tmp")),
    "the report": lambda out, run: "peak memory: " in out,
}


def kill(process: int) -> None:
    """Kill a process by its id."""
    os.kill(process, signal.SIGKILL)


@dataclasses.dataclass
class Chain:
    """A run with several faults in a row.

    Attributes:
        recipe: arguments of the command, without the run's folder.
        run: the run's folder.
        rows: counts of `COLUMNS` by the kind of fault, shared by all chains.
        faults: (kind, whether the command handled it well) of each fault so far.
        saved: the newest checkpoint so far.
    """

    recipe: list[str]
    run: pathlib.Path
    rows: dict[str, collections.Counter]
    faults: list[tuple[str, bool]] = dataclasses.field(default_factory=list)
    saved: int = 0

    def start(self, watch: Watch | None = None, act: Callable | None = None) -> tuple[int, str]:
        """Run the command, and call `act` with its process id when `watch` is true.

        Returns (exit code, standard error).
        """
        command = commands.command("grpo.train", *self.recipe, f"--config.run_dir={self.run}")
        self.saved = max([self.saved, *saved_epochs(self.run)])
        deadline = time.monotonic() + 120  # a command that hangs is killed
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            process = subprocess.Popen(command, env=commands.environment(), stdout=out, stderr=err)
            while process.poll() is None:
                if act and watch and watch(os.pread(out.fileno(), 2**20, 0).decode(), self.run):
                    while commands.process_id(process) == process.pid and commands.SERVER:
                        time.sleep(0.001)  # until the command server has reported the process id
                    act(commands.process_id(process))
                    act = None
                if time.monotonic() > deadline:
                    kill(commands.process_id(process))
                time.sleep(0.0005 if act else 0.02)
            output, errors = (
                os.pread(file.fileno(), 2**24, 0).decode(errors="replace") for file in (out, err)
            )
        continued = re.search(r"(?:continuing .* after epoch (\d+)|trained parameters)", output)
        if continued and self.faults:
            self.rows[self.faults[-1][0]]["lost"] += max(0, self.saved - int(continued[1] or 0))
        return process.returncode, errors

    def suffer(self, kind: str, watch: Watch | None = None, act: Callable | None = None) -> None:
        """Run the command with a fault. A fault that comes too late is not counted."""
        code, errors = self.start(watch, act)
        if code != 0:
            messages = sum(line.startswith("error: ") for line in errors.splitlines())
            expected = (-signal.SIGKILL, 0) if act is kill else (1, 1)
            well = (code, messages) == expected and TRACEBACK not in errors
            self.rows[kind]["tracebacks"] += TRACEBACK in errors
            self.faults.append((kind, well))
            if not well:
                print(
                    f"{kind}: exit code {code}, {messages} messages\n{errors[-5000:]}", flush=True
                )

    def finish(self, expected: dict) -> None:
        """Run the command to its end, and compare the run with the undisturbed one."""
        code, errors = self.start()
        wrong = difference(expected, result(self.run)) if code == 0 else f"exit code {code}"
        good = not wrong and TRACEBACK not in errors
        print(
            f"{self.run.name}, {len(self.faults)} faults:",
            wrong or "equal",
            "" if good else errors,
            flush=True,
        )
        for kind, well in self.faults:
            self.rows[kind].update(
                tried=1, survived=well and good, silent=bool(wrong) and code == 0
            )


def saved_epochs(run: pathlib.Path) -> list[int]:
    """Return the epochs that have a checkpoint."""
    return [int(path.name) for path in (run / "checkpoints").glob("*") if path.name.isdecimal()]


def result(run: pathlib.Path) -> dict:
    """Return everything that a run computed: {name: array or value}."""
    epoch = max(saved_epochs(run))
    found: dict = {"epoch": epoch}
    for item in ("state", "trained"):
        tree = read_numpy(run / "checkpoints" / str(epoch) / item)
        found |= {
            item + jax.tree_util.keystr(path): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }
    for name in (run_log.METRICS, run_log.EVALUATIONS):
        for i, line in enumerate((run / name).read_text().splitlines(), 1):
            found |= {
                f"{name} line {i}: {key}": value
                for key, value in json_lines.flatten(json.loads(line)).items()
                if not CLOCKS.fullmatch(key)
            }
    return found


def difference(a: dict, b: dict) -> str:
    """Return which values of two results differ in any bit, or ''."""

    def bits(result: dict) -> dict:
        arrays = {key: np.asarray(value) for key, value in result.items()}
        return {key: (array.dtype, array.shape, array.tobytes()) for key, array in arrays.items()}

    a, b = bits(a), bits(b)
    names = [key for key in a | b if a.get(key) != b.get(key)]
    return f"{len(names)} differ, first {names[0]}" if names else ""


def kill_runs(
    chain: Callable[[str], Chain], kills: int, seconds: float, seed: int, expected: dict
) -> None:
    """Kill runs in turn in three stages and at three random instants, until `kills` are reached.

    seconds: duration of an undisturbed run. expected: its result.
    """
    rng, stages = random.Random(seed), collections.deque(STAGES)
    tried = 0
    while tried < kills:
        aimed, other = chain(f"killed {tried}"), chain(f"killed {tried}, at random")
        for stage in list(stages)[:3]:
            aimed.suffer(f"SIGKILL in {stage}", STAGES[stage], kill)
        stages.rotate(-3)
        for _ in range(3):
            instant = time.monotonic() + rng.uniform(0, 0.8 * seconds)
            other.suffer(
                "SIGKILL at a random instant",
                lambda out, run, at=instant: time.monotonic() >= at,
                kill,
            )
        for run in (aimed, other):
            run.finish(expected)
            tried += len(run.faults)


def fill_disks(chain: Callable[[str], Chain], disks: int, size: int, expected: dict) -> None:
    """Enlarge a run's full disk in steps up to `size`, then make another run's disk read-only.

    size: bytes of an undisturbed run. expected: its result.
    """
    full, read_only = chain("disk/full"), chain("disk/read-only")
    disk = full.run.parent

    def mount(options: str) -> None:
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "kills", disk], check=True, capture_output=True
        )

    disk.mkdir()
    try:
        mount("size=1m")
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        print(f"skipped full and read-only disks: no right to mount ({error})", flush=True)
        return
    try:
        for i in range(disks):
            mount(f"remount,size={int(size / 1024 * (i + 0.5) / disks)}k")
            full.suffer("a full disk")
        mount(f"remount,size={size * 8 // 1024}k")
        full.finish(expected)
        for stage in ("the first evaluation", "an epoch"):
            mount("remount,ro")
            read_only.suffer("a read-only disk")
            mount("remount,rw")
            read_only.suffer(f"SIGKILL in {stage}", STAGES[stage], kill)
        read_only.finish(expected)
    finally:
        subprocess.run(["umount", "-l", disk], check=False)


def block(chain: Callable[[str], Chain], expected: dict) -> None:
    """Put files and folders where a run writes others, and move another run's folder away."""
    blocked, moved = chain("blocked"), chain("moved")
    for name, kind in OBSTACLES.items():  # in the order in which a run creates them
        path = blocked.run / name
        path.parent.mkdir(exist_ok=True)
        if kind == "file":
            path.touch(exist_ok=False)
        else:
            path.mkdir()
        blocked.suffer(f"a {kind} in the way of {'the run folder' if name == '.' else name}")
        if kind == "file":
            path.unlink()
        else:
            path.rmdir()
    blocked.finish(expected)
    elsewhere = moved.run.with_name("elsewhere")
    for stage in ("compiling", "the first evaluation", "a save", "the report"):
        moved.suffer(
            "run folder moved away", STAGES[stage], lambda pid: moved.run.rename(elsewhere)
        )
        if elsewhere.exists():
            # what the command wrote after its folder was gone
            shutil.rmtree(moved.run, ignore_errors=True)
            elsewhere.rename(moved.run)
    moved.finish(expected)


def main(_) -> None:
    rows: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    with tempfile.TemporaryDirectory(prefix="kills-") as name:
        folder = pathlib.Path(name)
        os.environ.update(
            JAX_PLATFORMS="cpu", JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0.2", XLA_FLAGS=QUICK
        )
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "compiled"))
        convert(str(tiny.write_pipeline(folder / "source", seed=3)), folder / "model", "float32")
        recipe = [
            "--config=configs/tiny_ocr.py",
            f"--config.model.path={folder}/model",
            *(f"--config.{setting}" for setting in SMALL.split()),
        ]
        for part in ("train", "heldout"):
            prompts = pathlib.Path(f"assets/prompts/tiny_{part}.txt").read_text()
            (folder / part).write_text("\n".join(prompts.splitlines()[:4]))
            recipe.append(f"--config.prompts.{part}={folder}/{part}")

        def chain(name: str) -> Chain:
            return Chain(recipe, folder / name, rows)

        # Two undisturbed runs: the first one compiles and gives the expected result, the second
        # one is timed
        first, second = chain("first"), chain("second")
        code, errors = first.start()
        if code != 0:
            sys.exit(f"the undisturbed run failed: {errors}")
        expected, start = result(first.run), time.monotonic()
        second.finish(expected)
        seconds = time.monotonic() - start
        size = sum(path.lstat().st_blocks * 512 for path in second.run.rglob("*"))
        print(
            f"undisturbed: {seconds:.0f} s, {size / 1e6:.1f} MB, {len(expected)} arrays and values",
            flush=True,
        )
        kill_runs(chain, flags.FLAGS.kills, seconds, flags.FLAGS.seed, expected)
        fill_disks(chain, flags.FLAGS.disks, size, expected)
        block(chain, expected)
    print(*table(rows), sep="\n")
    sys.exit(any(row["survived"] < row["tried"] or row["lost"] for row in rows.values()))


def table(rows: dict[str, collections.Counter]) -> list[str]:
    """Return the lines of a Markdown table."""
    lines = [
        [kind, *(str(row[column]) for column in COLUMNS)]
        for kind, row in [*rows.items(), ("all", sum(rows.values(), collections.Counter()))]
    ]
    return [
        f"| {' | '.join(line)} |"
        for line in [["fault", *COLUMNS], ["---"] * (1 + len(COLUMNS)), *lines]
    ]


if __name__ == "__main__":
    flags.DEFINE_integer("kills", 16, "smallest number of kills", lower_bound=0)
    flags.DEFINE_integer("disks", 8, "number of sizes of the disk that fills up", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "seed of the random instants")
    cli.run(main)

"""Times how soon this project and Flow-GRPO's loop in PyTorch improve a held-out reward.

    python -m benchmarks.race --out=build/race --seconds=520
    python -m benchmarks.race --out=build/race --sides=ours,theirs-2 --precision=autocast,fp32
    python -m benchmarks.race --out=build/race --seconds=0       # tables of what is there

Each run trains tiny-wan alone on the device until the held-out reward is `--target` above that of the
starting weights. The sides:

    theirs-2, theirs-9         Flow-GRPO's loop (`benchmarks.peer_training`) with 2 (Flow-GRPO-Fast) or
                               9 of 10 steps trained, in each `--precision`
    ours-same-2, ours-same-9   the same method by `grpo.train`, configs/tiny_grpo.py
    ours                       the default recipe by `grpo.train`, configs/tiny_ocr.py (DiffusionNFT)

Both get the same settings: prompts, groups, LoRA, AdamW, clip range, guidance, steps and which of
them are stochastic, noise, moving average, KL, scoring processes; and the same evaluation. Seconds are
those of sampling, decoding, waiting for scores and updates, until the first evaluation that reaches
the target; evaluations and checkpoints do not count. Three figures:

    seconds            without compilation; the PyTorch side without its warm-up
    with compilation   plus compilation in the side's first run, from an empty cache
    command            from the start of the process to the evaluation, without evaluations

OUT/race.md and OUT/race.json are written after every run. The runs of a seed come before those of the
next. After `--seconds` the running one is ended, and is made again by the next call; finished runs
are not repeated. A run that does not reach the target ends after `--limit` seconds of its own.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

from absl import app, flags

from benchmarks.race_tables import finished, measure, reached, table
from grpo.records import run_log

METHOD, DEFAULT = "configs/tiny_grpo.py", "configs/tiny_ocr.py"
MODEL, SOURCE = pathlib.Path("models/tiny-wan"), pathlib.Path("assets/tiny-wan")
FAST = ("sample.sde_steps=2", "sample.sde_range=(0,6)")
WHOLE = ("sample.sde_steps=9", "sample.sde_range=(0,9)")
SIDES = {
    "theirs-2": (METHOD, FAST),
    "theirs-9": (METHOD, WHOLE),
    "ours-same-2": (METHOD, FAST),
    "ours-same-9": (METHOD, WHOLE),
    "ours": (DEFAULT, ()),
}
TABLE, VALUES = "race.md", "race.json"
POLL, GRACE = 0.25, 20.0  # seconds between looks at a run, and before one is killed


@dataclasses.dataclass(frozen=True)
class Run:
    """A run of a side with a seed. precision: of the PyTorch side, else empty."""

    side: str
    precision: str
    seed: int

    @property
    def name(self) -> str:
        """The side's name in the results."""
        return f"{self.side}-{self.precision}" if self.precision else self.side

    def command(self, folder: pathlib.Path, FLAGS) -> list[str]:
        """Return the command that trains into a folder."""
        recipe, own = SIDES[self.side]
        settings = (
            f"run_dir={folder}",
            f"seed={self.seed}",
            f"epochs={FLAGS.epochs}",
            f"budget.seconds={FLAGS.limit}",
            f"eval.every={FLAGS.eval_every}",
            f"eval.num_prompts={FLAGS.prompts}",
            "eval.previews=0",
            f"reward.workers={FLAGS.workers}",
            "reward.panel=()",
            "save.every=1000000",
            "save.best=False",
            *own,
            *FLAGS.common,
        )
        module = ["grpo.train"]
        if self.precision:
            module = [
                "benchmarks.peer_training",
                f"--model={SOURCE}",
                f"--precision={self.precision}",
                f"--joined={FLAGS.joined}",
            ]
        arguments = [f"--config={recipe}", *(f"--config.{setting}" for setting in settings)]
        return [sys.executable, "-m", *module, *arguments]


def runs(FLAGS) -> list[Run]:
    """Return the runs that the flags ask for, the seeds one after the other."""
    return [
        Run(side, precision, int(seed))
        for seed in FLAGS.seeds
        for side in FLAGS.sides
        for precision in (FLAGS.precision if side.startswith("theirs") else [""])
    ]


# ---- one run -------------------------------------------------------------------------------------
def race(run: Run, out: pathlib.Path, FLAGS, deadline: float) -> dict:
    """Make a run, and return its figures. It is ended at the deadline, by the monotonic clock."""
    folder = out / "runs" / run.name / f"seed{run.seed}"
    shutil.rmtree(folder, ignore_errors=True)  # of the same run, which was ended
    folder.mkdir(parents=True)
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(out / "compiled" / run.side),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    began, ended = time.time(), ""
    with folder.with_name(f"{folder.name}.log").open("wb") as output:
        process = subprocess.Popen(
            run.command(folder, FLAGS),
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | cache,
            start_new_session=True,
        )
        while process.poll() is None and not ended:
            time.sleep(POLL)
            if reached(run_log.read_evaluations(folder), FLAGS.target) is not None:
                ended = "reached"
            elif time.monotonic() > deadline:
                ended = "stopped"
        end(process)
    return measure(
        folder, FLAGS.target, began, ended or ("failed" if process.returncode else "limit")
    )


def end(process: subprocess.Popen) -> None:
    """Ask a run to end, and end what it has started."""
    if process.poll() is None:
        process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
    with contextlib.suppress(ProcessLookupError):  # nothing of it is left
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main(_) -> None:
    FLAGS = flags.FLAGS
    deadline = time.monotonic() + FLAGS.seconds
    out = pathlib.Path(FLAGS.out).absolute()
    out.mkdir(parents=True, exist_ok=True)
    if not MODEL.exists():
        convert = ("--src", SOURCE, "--dst", MODEL, "--dtype", "float32")
        command = [sys.executable, "-m", "convert.from_diffusers", *map(str, convert)]
        subprocess.run(command, check=True)
    described = {
        "target": FLAGS.target,
        "prompts": FLAGS.prompts,
        "every": FLAGS.eval_every,
        "workers": FLAGS.workers,
        "joined": FLAGS.joined,
        "common": FLAGS.common,
    }
    path = out / VALUES
    results = json.loads(path.read_text()) if path.exists() else described | {"runs": {}}
    changed = [key for key, value in described.items() if results[key] != value]
    if changed:
        raise app.UsageError(
            f"{path} was measured with {changed[0]}={results[changed[0]]}, not "
            f"{described[changed[0]]}: choose another --out"
        )
    for run in runs(FLAGS):
        known = results["runs"].setdefault(run.name, {})
        if time.monotonic() > deadline or (
            str(run.seed) in known and finished(known[str(run.seed)])
        ):
            continue
        found = race(run, out, FLAGS, deadline)
        known[str(run.seed)] = found
        path.write_text(json.dumps(results, indent=1) + "\n")
        (out / TABLE).write_text(table(results))
        print(
            f"{run.name}, seed {run.seed}: {found['ended']}, {found['seconds']:.1f} s", flush=True
        )
        if found["ended"] == "failed":
            log = out / "runs" / run.name / f"seed{run.seed}.log"
            print(log.read_text(errors="replace")[-2000:], flush=True)
    (out / TABLE).write_text(table(results))
    print((out / TABLE).read_text(), flush=True)


if __name__ == "__main__":
    flags.DEFINE_string("out", None, "folder of the tables and the runs", required=True)
    flags.DEFINE_list("sides", list(SIDES), "sides to race")
    flags.DEFINE_list("seeds", ["0", "1", "2"], "seeds of each side")
    flags.DEFINE_list("precision", ["autocast"], "of the PyTorch side: autocast, fp32")
    flags.DEFINE_bool("joined", True, "PyTorch side: one forward pass for guidance, not two")
    flags.DEFINE_float("target", 0.15, "gain of the held-out reward")
    flags.DEFINE_float("seconds", 520, "after which no run goes on")
    flags.DEFINE_float("limit", 120, "seconds of one run, as they are counted")
    flags.DEFINE_integer("epochs", 1000, "of one run, at most", lower_bound=1)
    flags.DEFINE_integer("eval_every", 2, "epochs between evaluations", lower_bound=1)
    flags.DEFINE_integer("prompts", 128, "held-out prompts of each evaluation", lower_bound=2)
    flags.DEFINE_integer("workers", 14, "scoring processes", lower_bound=1)
    flags.DEFINE_list("common", [], "KEY=VALUE of all runs")
    flags.register_validator(
        "sides", lambda names: set(names) <= set(SIDES), f"known sides: {', '.join(SIDES)}"
    )
    flags.register_validator(
        "precision", lambda names: set(names) <= {"autocast", "fp32"}, "autocast, fp32"
    )
    app.run(main)

"""Runs recipes under equal budgets and draws their held-out rewards against each other, with bands
over seeds.

    python -m grpo.compare --configs=a.py,b.py --seeds=0,1,2 --budget=evaluations:20000
    --out=runs/compared python -m grpo.compare --methods=configs/compare_tiny.txt
    --budget=seconds:300 --out=runs/compared --jobs=2 python -m grpo.compare --method='cps:
    configs/tiny_grpo.py sample.sde=cps' --configs=configs/tiny_ocr.py ...

A method is a recipe with a name and settings, NAME: RECIPE KEY=VALUE ..., a line in the file of
--methods (quotes as in a shell, # begins a comment). Each method and seed is a run of `grpo.train`
in OUT/NAME/seed<k>, its output in OUT/NAME/seed<k>.log. Budgets: evaluations and seconds as
`grpo.settings.budget` counts them, or epochs; a run ends after the epoch that reaches its budget.
The same command again goes on where it was stopped: finished runs are not repeated, and one that
failed is tried again. After every run OUT gets comparison.html, comparison.md and comparison.json,
of the runs finished by then.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

import ml_collections
from absl import flags
from ml_collections import config_flags

from grpo.records import run_log
from grpo.report import comparison_report
from grpo.settings import parse as settings
from grpo.settings.budget import Budget, Spent
from wan_jax.command_line import cli
from wan_jax.command_line.flag_types import define_number, define_path
from wan_jax.command_line.limits import Range
from wan_jax.errors import UserError
from wan_jax.storage import folder_lock

UNITS = ("evaluations", "seconds", "epochs")
ENDLESS = 1_000_000  # epochs of a run that its budget ends
FINISHED = "finished.json"  # in a run's folder: the settings it was finished with
GRACE = 60  # seconds for a run to stop when told to


@dataclasses.dataclass(frozen=True)
class Method:
    name: str
    recipe: str
    overrides: tuple[str, ...] = ()  # KEY=VALUE

    @classmethod
    def parse(cls, line: str) -> "Method":
        """NAME: RECIPE KEY=VALUE ... Raises `UserError` on anything else."""
        name, _, rest = line.partition(":")
        try:
            recipe, *overrides = shlex.split(rest, comments=True)
        except ValueError:
            recipe, overrides = "", []
        if (
            not re.fullmatch(r"[\w.+-]+", name.strip())
            or not recipe
            or not all("=" in o for o in overrides)
        ):
            raise UserError(
                f"{line.strip()!r} is no method: write NAME: RECIPE KEY=VALUE ..., the name of "
                "letters, digits and . _ + -"
            )
        return cls(name.strip(), recipe, tuple(overrides))

    def arguments(self, *more: str) -> list[str]:
        """Of `grpo.train`; later settings win."""
        return [f"--config={self.recipe}", *(f"--config.{o}" for o in (*self.overrides, *more))]

    def config(self, *more: str) -> ml_collections.ConfigDict:
        """The recipe with its settings, checked as `grpo.train` would. Raises `UserError`."""
        argv, values = ["grpo.train", *self.arguments(*more)], flags.FlagValues()
        config_flags.DEFINE_config_file("config", None, flag_values=values, sys_argv=argv)
        try:
            values(cli.with_recipe(cli.last_of_each(argv)))
            c = values["config"].value
            settings.from_config(c)
        except (UserError, *cli.FLAG_ERRORS) as error:
            raise UserError(f"{self.name}: {cli.flag_message(error)}") from None
        return c


@dataclasses.dataclass(frozen=True)
class Job:
    """One training run."""

    method: Method
    seed: int
    folder: pathlib.Path
    extra: tuple[str, ...]  # KEY=VALUE of this run alone

    @property
    def log(self) -> pathlib.Path:
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def wanted(self) -> str:
        """What `FINISHED` holds once the run is finished."""
        return (
            json.dumps(
                run_log.plain(settings.flat(self.method.config(*self.extra).to_dict())), indent=1
            )
            + "\n"
        )

    def finished(self) -> bool:
        path = self.folder / FINISHED
        return path.is_file() and path.read_text(encoding="utf-8") == self.wanted

    def failure(self) -> str:
        """The last line of its output."""
        lines = (
            self.log.read_text(encoding="utf-8", errors="replace").split("\n")
            if self.log.is_file()
            else []
        )
        return next((line.strip() for line in reversed(lines) if line.strip()), "no output")


def read_methods(configs: Sequence[str], lines: Sequence[str], path: str | None) -> list[Method]:
    """Of --configs, --method and --methods, in this order. Raises `UserError` where there are none
    or two of a name.
    """
    if path is not None:
        text = cli.read_text(path, "--methods", "give a file of lines NAME: RECIPE KEY=VALUE ...")
        lines = [
            *lines,
            *(
                line
                for line in text.splitlines()
                if line.strip() and not line.lstrip().startswith("#")
            ),
        ]
    methods = [Method(pathlib.Path(config).stem, config) for config in configs] + [
        Method.parse(x) for x in lines
    ]
    names = [m.name for m in methods]
    if not methods or len(set(names)) < len(names):
        twice = ", ".join(sorted({name for name in names if names.count(name) > 1}))
        raise UserError(
            f"two methods are named {twice}: give each its own name with --method"
            if methods
            else "no methods: give --configs, --method or --methods"
        )
    return methods


def parse_budget(text: str) -> tuple[str, float]:
    """'evaluations:20000' -> ('evaluations', 20000). Raises `UserError`."""
    unit, _, number = text.partition(":")
    try:
        amount = float(number) if unit == "seconds" else int(number)
    except ValueError:
        amount = 0
    if unit not in UNITS or not 0 < amount < float("inf"):
        raise UserError(f"--budget={text}: give {', '.join(f'{u}:N' for u in UNITS)}, N above 0")
    return unit, amount


def budget_settings(unit: str, amount: float) -> tuple[str, ...]:
    return (
        (f"epochs={amount}",)
        if unit == "epochs"
        else (f"epochs={ENDLESS}", f"budget.{unit}={amount}")
    )


def check_not_beyond(folder: pathlib.Path, unit: str, amount: float):
    """Raises `UserError` where an earlier comparison with a larger budget left a run that has spent
    more.
    """
    metrics = run_log.read_metrics(folder)
    budget = Budget() if unit == "epochs" else Budget(**{unit: amount})
    # a run stops with the epoch that reaches the budget, so the one before has not
    before = metrics[-2:-1]
    if any(
        m["epoch"] >= amount
        if unit == "epochs"
        else budget.reached(
            Spent(*(run_log.number(m, f"spent_{name}") or 0 for name in ("evaluations", "seconds")))
        )
        for m in before
    ):
        raise UserError(
            f"{folder} has spent more than {unit}:{amount:g} already; give a larger --budget or "
            "another --out"
        )


def environment(out: pathlib.Path, device: str | None, shared: bool) -> dict[str, str]:
    """Of a run: all share the compiled programs; with a device it sees that one alone."""
    env = {"JAX_COMPILATION_CACHE_DIR": str(out / "compiled")}
    if shared:
        env["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    env |= os.environ
    return (
        env
        if device is None
        else env | {"CUDA_VISIBLE_DEVICES": device, "HIP_VISIBLE_DEVICES": device}
    )


def run_all(
    jobs: Sequence[Job], slots: Sequence[dict[str, str]]
) -> Iterator[tuple[Job, int, float]]:
    """Runs the jobs, one at a time in the environment of each slot; yields (job, exit code,
    seconds) as they end. Those still running are stopped when the caller stops.
    """
    waiting, running = list(jobs), {}
    try:
        while waiting or running:
            for slot in range(len(slots)):
                if slot not in running and waiting:
                    running[slot] = (
                        (job := waiting.pop(0)),
                        start(job, slots[slot]),
                        time.monotonic(),
                    )
                    print(
                        f"{job.method.name}, seed {job.seed}: started, output in {job.log}",
                        flush=True,
                    )
            time.sleep(0.1)
            for slot, (job, process, since) in list(running.items()):
                if process.poll() is not None:
                    del running[slot]
                    yield job, process.returncode, time.monotonic() - since
    finally:
        for _, process, _ in running.values():
            process.send_signal(signal.SIGINT)
        for _, process, _ in running.values():
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.kill()


def start(job: Job, env: dict[str, str]) -> subprocess.Popen:
    """In a session of its own: Ctrl-C reaches it once, through `run_all`."""
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "grpo.train", *job.method.arguments(*job.extra)]
    with open(job.log, "w", encoding="utf-8") as log:
        return subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def main(_):
    f = flags.FLAGS
    out = pathlib.Path(f.out)
    methods = read_methods(f.configs, f.method, f.methods)
    unit, amount = parse_budget(f.budget)
    try:
        seeds = [int(seed) for seed in f.seeds]
        common = shlex.split(f.common)
    except ValueError as error:
        raise UserError(f"--seeds={','.join(f.seeds)}, --common={f.common}: {error}") from None
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds={','.join(f.seeds)}: give different whole numbers")
    # the runs are stopped on the way out
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(cli.TERMINATED))
    jobs = [
        Job(
            m,
            seed,
            folder := out / m.name / f"seed{seed}",
            (*common, f"seed={seed}", f"run_dir={folder}", *budget_settings(unit, amount)),
        )
        for seed in seeds
        for m in methods
    ]  # every method once before any twice
    for job in jobs:
        job.method.config(*job.extra)
        check_not_beyond(job.folder, unit, amount)

    finished, failures = [job for job in jobs if job.finished()], {}
    parallel = f.jobs or max(1, len(f.devices))
    described = {m.name: " ".join([m.recipe, *m.overrides]) for m in methods}
    differing = comparison_report.differing(
        {m.name: settings.flat(m.config(*common).to_dict()) for m in methods}
    )
    command = shlex.join(["python", "-m", "grpo.compare", *sys.argv[1:]])

    def write() -> list[str]:
        """Of the runs that are finished by now."""
        runs, left_out = {m.name: {} for m in methods}, dict(failures)
        for job in jobs:
            if job in finished:
                try:
                    runs[job.method.name][job.seed] = comparison_report.read_curve(job.folder)
                except UserError as error:
                    left_out[f"{job.method.name}, seed {job.seed}"] = str(error)
        return comparison_report.write(
            comparison_report.Comparison(
                described, runs, (unit, amount), f.reach, left_out, parallel, command, differing
            ),
            out,
        )

    slots = [
        environment(
            out.absolute(),
            f.devices[i % len(f.devices)] if f.devices else None,
            parallel > max(1, len(f.devices)),
        )
        for i in range(parallel)
    ]
    print(
        f"{len(methods)} methods x {len(seeds)} seeds, {f.budget} each; {len(finished)} of "
        f"{len(jobs)} runs are finished, {parallel} at a time",
        flush=True,
    )
    waiting = [job for job in jobs if job not in finished]
    with folder_lock.locked(out, "--out"), contextlib.closing(run_all(waiting, slots)) as ended:
        for job, code, seconds in ended:
            label = f"{job.method.name}, seed {job.seed}"
            if code:
                failures[label] = job.failure()
                print(f"{label}: failed with exit code {code}: {failures[label]}", flush=True)
            else:
                run_log.write_atomically(job.folder / FINISHED, job.wanted.encode())
                finished.append(job)
                print(f"{label}: finished in {seconds:.0f} s", flush=True)
                write()
        print("", *write(), sep="\n")
    if failures:
        raise UserError(
            f"{len(failures)} of {len(jobs)} runs failed: {', '.join(failures)}; the same command "
            "tries them again"
        )


if __name__ == "__main__":
    flags.DEFINE_list("configs", [], "recipes, each a method named after its file")
    flags.DEFINE_multi_string(
        "method", [], "NAME: RECIPE KEY=VALUE ..., may be given several times"
    )
    define_path("methods", "file with a method a line")
    flags.DEFINE_string(
        "common", "", "KEY=VALUE ..., settings of all methods, e.g. 'eval.every=5 reward.workers=1'"
    )
    flags.DEFINE_list("seeds", ["0", "1", "2"], "config.seed of the runs of each method")
    flags.DEFINE_string(
        "budget", None, "of each run: evaluations:N, seconds:N or epochs:N", required=True
    )
    define_path("out", "folder to write", required=True)
    define_number(
        "reach",
        0.15,
        "gain of the held-out reward to which evaluations and seconds are told",
        Range(0, above=True),
    )
    flags.DEFINE_integer(
        "jobs", 0, "runs at the same time; 0: one for each of --devices", lower_bound=0
    )
    flags.DEFINE_list(
        "devices", [], "numbers of the GPUs (CUDA or HIP) that runs get, in turn; none: all see all"
    )
    cli.run(main)

"""Compares methods under equal budgets: runs them on several seeds and draws their held-out rewards.

    python -m grpo.compare --configs=a.py,b.py --seeds=0,1,2 --budget=evaluations:20000 --out=runs/a
    python -m grpo.compare --methods=configs/compare_tiny.txt --budget=seconds:300 --out=runs/all
    python -m grpo.compare --method='cps: configs/tiny_grpo.py sample.sde=cps' --budget=epochs:9 ...

A method is a recipe with a name and settings, NAME: RECIPE KEY=VALUE ..., one per line in the file
of --methods (quotes as in a shell, # begins a comment). Each method and seed is a run of
`grpo.train` in OUT/NAME/seed<k>, with its output in OUT/NAME/seed<k>.log. Budgets are epochs, or
evaluations and seconds as `grpo.settings.budget` counts them; a run ends after the epoch that
reaches its budget. The same command continues where it was stopped: it does not repeat finished
runs, and tries failed ones again. After every run it writes comparison.html, .md and .json of the
runs that are finished.
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
from collections.abc import Generator, Sequence
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from grpo.records import json_lines, run_log
from grpo.records.run_files import write_atomically
from grpo.report import comparison_report
from grpo.report.comparison_report import Comparison
from grpo.report.page import plural
from grpo.settings import parse as settings
from grpo.settings.budget import UNITS, Budget, Spent, budget_settings, parse_budget
from grpo.settings.validation import flat
from wan_jax.command_line import cli, parsing, recipe_files
from wan_jax.command_line.flag_types import define_number, define_path
from wan_jax.command_line.limits import Range
from wan_jax.errors import UserError
from wan_jax.storage import folder_lock

FINISHED = "finished.json"  # in a run's folder: the settings with which it was finished
EPOCH_SECONDS = 10  # for the epoch of a run that was told to stop, which it finishes and saves
STOP_SECONDS = 60  # before a run that was told to stop at once is killed
EXPECTED = "expected NAME: RECIPE KEY=VALUE ..., the name of letters, digits and . _ + -"


@dataclasses.dataclass(frozen=True)
class Method:
    """A recipe with a name and settings, each KEY=VALUE."""

    name: str
    recipe: str
    overrides: tuple[str, ...] = ()

    @classmethod
    def parse(cls, line: str) -> "Method":
        """Read NAME: RECIPE KEY=VALUE ... Raises `UserError` on anything else."""
        name, _, rest = line.partition(":")
        try:
            recipe, *overrides = shlex.split(rest, comments=True)
        except ValueError:
            recipe, overrides = "", []
        named = re.fullmatch(r"[\w.+-]+", name.strip())
        if not named or not recipe or not all("=" in o for o in overrides):
            raise UserError(f"invalid method {line.strip()!r}: {EXPECTED}")
        return cls(name.strip(), recipe, tuple(overrides))

    def __str__(self) -> str:
        return " ".join([self.recipe, *self.overrides])

    def arguments(self, *more: str) -> list[str]:
        """Return the arguments of `grpo.train`; later settings win."""
        return [f"--config={self.recipe}", *(f"--config.{o}" for o in (*self.overrides, *more))]

    def config(self, *more: str) -> ml_collections.ConfigDict:
        """Return the recipe with its settings, checked as by `grpo.train`. Raises `UserError`."""
        argv, values = ["grpo.train", *self.arguments(*more)], flags.FlagValues()
        config_flags.DEFINE_config_file("config", None, flag_values=values, sys_argv=argv)
        try:
            values(recipe_files.with_recipe(parsing.last_of_each(argv)))
            config: Any = values["config"].value
            settings.from_config(config)
        except (UserError, *parsing.FLAG_ERRORS) as error:
            raise UserError(f"{self.name}: {parsing.flag_message(error)}") from None
        return config

    def flat_config(self, *more: str) -> dict:
        """Return `config` with joined keys: {'train.learning_rate': 1e-4}."""
        return flat(self.config(*more).to_dict())


@dataclasses.dataclass(frozen=True)
class Job:
    """One training run. extra: KEY=VALUE of this run alone."""

    method: Method
    seed: int
    folder: pathlib.Path
    extra: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.method.name}, seed {self.seed}"

    @property
    def log(self) -> pathlib.Path:
        """The file of the run's output."""
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def expected(self) -> str:
        """The content of `FINISHED` once the run is finished."""
        return json.dumps(json_lines.plain(self.method.flat_config(*self.extra)), indent=1) + "\n"

    def finished(self) -> bool:
        """Return whether the run was finished with these settings."""
        path = self.folder / FINISHED
        return path.is_file() and path.read_text(encoding="utf-8") == self.expected

    def mark_finished(self) -> None:
        write_atomically(self.folder / FINISHED, self.expected.encode())

    def failure(self) -> str:
        """Return the last line of the run's output."""
        if not self.log.is_file():
            return "no output"
        lines = self.log.read_text(encoding="utf-8", errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "no output")


def read_methods(configs: Sequence[str], lines: Sequence[str], path: str | None) -> list[Method]:
    """Return the methods of --configs, --method and the file of --methods, in this order.

    Raises:
      UserError: there are none, or two have one name.
    """
    if path is not None:
        text = cli.read_text(path, "--methods", "give a file of lines NAME: RECIPE KEY=VALUE ...")
        stripped = [line.strip() for line in text.splitlines()]
        lines = [*lines, *(line for line in stripped if line and not line.startswith("#"))]
    methods = [Method(pathlib.Path(config).stem, config) for config in configs]
    methods += [Method.parse(line) for line in lines]
    if not methods:
        raise UserError("no methods: give --configs, --method or --methods")
    names = [method.name for method in methods]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(
            f"two methods are named {', '.join(repeated)}: give each its own name with --method"
        )
    return methods


def check_not_beyond(folder: pathlib.Path, unit: str, amount: float) -> None:
    """Raise `UserError` if an earlier comparison with a larger budget left a run that spent more."""
    # the epoch that reaches the budget is the last, so the one before has not reached it
    for record in run_log.read_metrics(folder)[-2:-1]:
        if unit == "epochs":
            beyond = record["epoch"] >= amount
        else:
            evaluations, seconds = (run_log.number(record, f"spent_{name}") for name in UNITS[:2])
            spent = Spent(int(evaluations or 0), seconds or 0.0)
            limit: dict[str, Any] = {unit: amount}
            beyond = Budget(**limit).reached(spent)
        if beyond:
            raise UserError(
                f"{folder} has spent more than {unit}:{amount:g} already; give a larger --budget "
                "or another --out"
            )


def environment(out: pathlib.Path, device: str | None, shared: bool) -> dict[str, str]:
    """Return the environment of a run. Variables of this process come first.

    Args:
      out: absolute path of the comparison, whose runs share their compiled functions.
      device: number of the only GPU that the run sees; None: all.
      shared: whether several runs use one device.
    """
    env = {"JAX_COMPILATION_CACHE_DIR": str(out / "compiled")}
    if shared:
        env["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    env |= os.environ
    if device is not None:
        env |= {"CUDA_VISIBLE_DEVICES": device, "HIP_VISIBLE_DEVICES": device}
    return env


def run_all(
    jobs: Sequence[Job], environments: Sequence[dict[str, str]]
) -> Generator[tuple[Job, int, float], None, None]:
    """Run the jobs, one at a time in each environment.

    Yields (job, exit code, seconds) as they end. Those still running are stopped when the caller
    closes the iterator.
    """
    waiting = list(jobs)
    running: dict[int, tuple[Job, subprocess.Popen, float]] = {}  # by index of the environment
    try:
        while waiting or running:
            for slot, env in enumerate(environments):
                if slot not in running and waiting:
                    job = waiting.pop(0)
                    running[slot] = (job, start(job, env), time.monotonic())
                    print(f"{job}: started, output in {job.log}", flush=True)
            time.sleep(0.1)
            for slot, (job, process, begun) in list(running.items()):
                if process.poll() is not None:
                    del running[slot]
                    yield job, process.returncode, time.monotonic() - begun
    finally:
        stop([process for _, process, _ in running.values()])


def stop(processes: Sequence[subprocess.Popen]) -> None:
    """Stop runs: after their epoch if that ends soon, else at once."""
    for seconds in (EPOCH_SECONDS, STOP_SECONDS):
        deadline = time.monotonic() + seconds
        for process in processes:
            process.send_signal(signal.SIGINT)  # does nothing to one that has ended
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
    for process in processes:
        process.kill()


def start(job: Job, env: dict[str, str]) -> subprocess.Popen:
    """Start a run in a session of its own, so that Ctrl-C reaches it once, through `run_all`."""
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


def write_comparison(
    comparison: Comparison, finished: Sequence[Job], failures: dict[str, str], out: pathlib.Path
) -> list[str]:
    """Write the comparison of the finished jobs into `out`; return the lines to print.

    comparison: its `runs` and `failures` are replaced. A job that gives no curve becomes a failure.
    """
    runs, failures = {name: {} for name in comparison.methods}, dict(failures)
    for job in finished:
        try:
            runs[job.method.name][job.seed] = comparison_report.read_curve(job.folder)
        except UserError as error:
            failures[str(job)] = str(error)
    return comparison_report.write(
        dataclasses.replace(comparison, runs=runs, failures=failures), out
    )


def check_folders(methods: Sequence[Method], common: Sequence[str]) -> None:
    """Raise `UserError` where the models or the data of methods do not exist, with all of them."""
    lost: dict[str, list[str]] = {}
    for method in methods:
        values = method.flat_config(*common)
        for key in ("model.path", "data.path"):
            if values[key] and not pathlib.Path(values[key]).is_dir():
                lost.setdefault(f"{key}={values[key]}", []).append(method.name)
    if lost:
        listed = "; ".join(f"{place} (of {', '.join(names)})" for place, names in lost.items())
        raise UserError(
            f"folders that do not exist: {listed}. Models are written by convert.from_diffusers, data by "
            "grpo.encode_clips (--src, or --from_model for a model's own samples). No run was started"
        )


def main(_):
    args = flags.FLAGS
    out = pathlib.Path(args.out)
    # 1 read what to run
    methods = read_methods(args.configs, args.method, args.methods)
    unit, amount = parse_budget(args.budget)
    try:
        seeds = [int(seed) for seed in args.seeds]
        common = shlex.split(args.common)
    except ValueError as error:
        raise UserError(
            f"--seeds={','.join(args.seeds)}, --common={args.common}: {error}"
        ) from None
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds={','.join(args.seeds)}: give different whole numbers")
    jobs = []
    for seed in seeds:  # each method runs once before any runs twice
        for method in methods:
            folder = out / method.name / f"seed{seed}"
            own = (f"seed={seed}", f"run_dir={folder}", *budget_settings(unit, amount))
            jobs.append(Job(method, seed, folder, (*common, *own)))

    # 2 check every run before the first one starts
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(cli.TERMINATED))  # leaving stops the runs
    for job in jobs:
        job.method.config(*job.extra)
        check_not_beyond(job.folder, unit, amount)
    check_folders(methods, common)
    finished, failures = [job for job in jobs if job.finished()], {}
    parallel = args.jobs or max(1, len(args.devices))
    comparison = Comparison(
        methods={method.name: str(method) for method in methods},
        runs={},
        budget=(unit, amount),
        reach=args.reach,
        failures={},
        parallel=parallel,
        command=shlex.join(["python", "-m", "grpo.compare", *sys.argv[1:]]),
        differing=comparison_report.differing(
            {method.name: method.flat_config(*common) for method in methods}
        ),
    )

    # 3 run
    shared = parallel > max(1, len(args.devices))
    devices = args.devices or [None]
    environments = [
        environment(out.absolute(), devices[i % len(devices)], shared) for i in range(parallel)
    ]
    print(
        f"{plural(len(methods), 'method')} x {plural(len(seeds), 'seed')}, {args.budget} each; "
        f"{len(finished)} of {len(jobs)} runs are finished, {parallel} at a time",
        flush=True,
    )
    waiting = [job for job in jobs if job not in finished]
    with (
        folder_lock.locked(out, "--out"),
        contextlib.closing(run_all(waiting, environments)) as ended,
    ):
        for job, code, seconds in ended:
            if code:
                failures[str(job)] = job.failure()
                print(f"{job}: failed with exit code {code}: {job.failure()}", flush=True)
                continue
            job.mark_finished()
            finished = [done for done in jobs if done in finished or done is job]
            print(f"{job}: finished in {seconds:.0f} s", flush=True)
            write_comparison(comparison, finished, failures, out)
        print("", *write_comparison(comparison, finished, failures, out), sep="\n")
    if failures:
        raise UserError(
            f"{len(failures)} of {len(jobs)} runs failed: {', '.join(failures)}; the same command "
            "tries them again"
        )


if __name__ == "__main__":
    flags.DEFINE_list("configs", [], "recipes, each a method named after its file")
    flags.DEFINE_multi_string(
        "method", [], "NAME: RECIPE KEY=VALUE ...; may be given several times"
    )
    define_path("methods", "file with one method per line")
    flags.DEFINE_string(
        "common", "", "KEY=VALUE ..., settings of all methods, e.g. 'eval.every=5 reward.workers=1'"
    )
    flags.DEFINE_list("seeds", ["0", "1", "2"], "config.seed of the runs of each method")
    flags.DEFINE_string(
        "budget", None, "budget of each run: evaluations:N, seconds:N or epochs:N", required=True
    )
    define_path("out", "folder to write", required=True)
    define_number(
        "reach",
        0.15,
        "gain of the held-out reward for which evaluations and seconds are reported",
        Range(0, above=True),
    )
    flags.DEFINE_integer(
        "jobs", 0, "runs at the same time; 0: one for each of --devices", lower_bound=0
    )
    flags.DEFINE_list(
        "devices",
        [],
        "numbers of the GPUs (CUDA or HIP) that runs get in turn; not given: each run sees all",
    )
    cli.run(main)

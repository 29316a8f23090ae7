"""Runs that are made to hack their reward, and whether the guard notices (docs/explanation/hacking.md).

    python -m benchmarks.hacking --out=runs/hacking --jobs=6 --seconds=480 [--only=c,d,e]
    python -m benchmarks.hacking --out=runs/hacking --seconds=0       # tables of what is there

tiny-wan is trained on one device, several runs at a time. The questions:

    a  proxy and gold   trained by Flow-GRPO's rules for pictures and for clips, judged by `spelling`
                        without a weight: which epoch does the guard choose? Also with runs that fall,
                        and with prompts of two texts (`two_texts`), of which Flow-GRPO's rule for clips
                        knows the first alone and takes the second for a mistake
    b  a fall           runs whose reward rises and falls: is the best before the fall?
    c  a flaw           darkness is rewarded too, three times as much as the text, or only added to it
                        (`dark_sum`): how soon is there an alarm?
    d  remedies         train.on_alarm=log, stop, kl for b and c
    e  box credit       train.box_credit 0, 0.5, 0.9: the reward, and how much the picture outside of
                        the text has changed
    f  best of N        with pruning by a reward head, reported by a second reader

After every run OUT/hacking.md and OUT/hacking.json are written (`benchmarks.hacking_tables`). Runs of
one command are started in the order of `CASES`; after `--seconds` the running ones are ended, and the
same command continues them. A run that is finished is not repeated.
"""

import dataclasses
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import jax
from absl import app, flags

from benchmarks import hacking_tables
from examples.tiny_wan import prompts
from grpo.records import run_log

PICTURES, STEPS = "configs/tiny_ocr.py", "configs/tiny_grpo.py"
MODEL = pathlib.Path("models/tiny-wan")
GOLD = "reward.own=gold=benchmarks.hacking_rewards:Spelling"
FAST = "train.learning_rate=1e-3"
DARKNESS = "reward.own=darkness=benchmarks.hacking_rewards:Darkness"
DARKER = ("reward.own_weights=darkness=3.0", "reward.combine=advantages", FAST)
RWR = ("train.method=rwr", "train.temperature=0.1", "train.kl_weight=0.5")
RAISED = ("train.on_alarm=kl",)
CLIPS = ("reward.rule=flow_grpo_video", "sample.frames=9")
PROXY = ("reward.rule=flow_grpo_image",)
PROMPTS = "train", "heldout"
LEVELS = 0.7, 0.5  # noise levels at which candidates are ranked
POLL, GRACE = 0.5, 15.0  # seconds between looks at the runs, and before one is killed


@dataclasses.dataclass(frozen=True)
class Case:
    """A run that is made with several seeds. settings: KEY=VALUE; every: epochs between evaluations."""

    question: str
    name: str
    epochs: int
    every: int
    recipe: str = PICTURES
    settings: tuple[str, ...] = ()
    seeds: int = 3
    two_texts: bool = False


def box_credit(method: str, recipe: str, strength: float) -> Case:
    settings = (f"train.box_credit={strength}", "eval.previews=48")
    return Case("e", f"{method}_{strength:g}", 20, 10, recipe, settings)


def variants(name: str, epochs: int, every: int, *settings: str) -> tuple[Case, ...]:
    """Return a case that is only logged, one that stops at an alarm, and two with a raised KL."""
    return (
        Case("c" if DARKNESS in settings else "b", name, epochs, every, settings=settings),
        Case(
            "d", f"{name}_kl1", epochs, every, settings=(*settings, *RAISED, "train.alarm_kl=1.0")
        ),
        Case(
            "d", f"{name}_kl10", epochs, every, settings=(*settings, *RAISED, "train.alarm_kl=10.0")
        ),
        Case(
            "d", f"{name}_stop", epochs, every, settings=(*settings, "train.on_alarm=stop"), seeds=1
        ),
    )


CASES = (
    *variants("dark", 16, 2, DARKNESS, *DARKER),
    Case("c", "dark_sum", 16, 2, settings=(DARKNESS, "reward.own_weights=darkness=1.0")),
    *(box_credit("nft", PICTURES, strength) for strength in (0.0, 0.5, 0.9)),
    *(box_credit("grpo", STEPS, strength) for strength in (0.0, 0.5, 0.9)),
    *variants("fall", 45, 5, *RWR, "train.learning_rate=5e-4"),
    Case("a", "proxy_clips", 40, 5, settings=(*CLIPS, GOLD, FAST)),
    Case("a", "proxy_pictures", 50, 5, settings=(*PROXY, GOLD, FAST)),
    Case("a", "proxy_fall", 45, 5, settings=(*PROXY, GOLD, *RWR, "train.learning_rate=5e-4")),
    Case("a", "proxy_fall_clips", 45, 5, settings=(*CLIPS, GOLD, *RWR, "train.learning_rate=5e-4")),
    Case("a", "two_texts", 40, 4, settings=(CLIPS[0], GOLD, FAST), two_texts=True),
    Case("b", "long", 220, 20, STEPS, seeds=1),
)


@dataclasses.dataclass(frozen=True)
class Job:
    """Commands that are run one after the other. folder: of their files."""

    name: str
    folder: pathlib.Path
    commands: tuple[tuple[str, ...], ...]

    @property
    def log(self) -> pathlib.Path:
        """The file of the output."""
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def done(self) -> pathlib.Path:
        """The file that marks a finished job, with its commands."""
        return self.folder / "finished"

    @property
    def text(self) -> str:
        """The commands, a line each."""
        return "".join(f"{shlex.join(command[1:])}\n" for command in self.commands)

    def finished(self) -> bool:
        """Return whether the job was finished with these commands, or by a version that did not keep
        them.
        """
        return self.done.exists() and self.done.read_text() in ("", self.text)


def module(name: str, *arguments: object) -> tuple[str, ...]:
    """Return the command of a module."""
    return sys.executable, "-m", name, *map(str, arguments)


def write_two_texts(folder: pathlib.Path) -> None:
    """Write prompts of two words, train.jsonl and heldout.jsonl, whose targets are the single words."""
    folder.mkdir(exist_ok=True)
    for seed, (name, heldout, count) in enumerate(zip(PROMPTS, (False, True), (2048, 256))):
        content = prompts.draw_content(
            jax.random.key(seed), count, split_heldout=heldout, mix=prompts.WordMix(two_lines=1.0)
        )
        records = [
            {"prompt": sentence, "targets": words.split()}
            for sentence, words in zip(prompts.sentences(content), prompts.words(content.letters))
        ]
        lines = "".join(f"{json.dumps(record)}\n" for record in records)
        (folder / f"{name}.jsonl").write_text(lines)


def training(case: Case, seed: int, out: pathlib.Path, FLAGS) -> Job:
    """Return the job of a case with a seed."""
    epochs = min(case.epochs, FLAGS.epochs or case.epochs)
    folder = out / case.name / f"seed{seed}"
    settings = (
        f"run_dir={folder}",
        f"seed={seed}",
        f"epochs={epochs}",
        f"eval.every={min(case.every, epochs)}",
        f"eval.num_prompts={FLAGS.prompts}",
        f"reward.workers={FLAGS.workers}",
        "eval.previews=2",
        "save.every=1000",
        "save.keep=1",
        "sample.steps=10",
        *case.settings,
        *(f"prompts.{name}={out}/prompts/{name}.jsonl" for name in PROMPTS if case.two_texts),
        *FLAGS.common,
    )
    arguments = (f"--config={case.recipe}", *(f"--config.{setting}" for setting in settings))
    commands = [module("grpo.train", *arguments)]
    if case.question == "e":
        commands.append(module("benchmarks.hacking_distance", folder))
    return Job(f"{case.name}, seed {seed}", folder, tuple(commands))


def best_of(out: pathlib.Path, FLAGS) -> Job:
    """Return the job of question f: a reward head, then best of 8 with and without pruning."""
    folder = out / "best_of"
    head, prompts = folder / "head.safetensors", folder / "prompts.txt"
    for name in ("all", *(f"at_{level}" for level in LEVELS)):
        (folder / name).mkdir(parents=True, exist_ok=True)
    lines = pathlib.Path("assets/prompts/tiny_heldout.txt").read_text().splitlines(keepends=True)
    prompts.write_text("".join(lines[: FLAGS.prompts]))
    settings = (f"reward.workers={2 * FLAGS.workers}", *FLAGS.common)
    train_head = module(
        "grpo.reward_head",
        f"--config={PICTURES}",
        *(f"--config.{setting}" for setting in settings),
        f"--out={head}",
        f"--videos={FLAGS.head_videos}",
        f"--updates={FLAGS.head_updates}",
    )

    def choose(name: str, *pruning: str) -> tuple[str, ...]:
        return module(
            "grpo.best_of",
            f"--model={MODEL}",
            f"--prompts={prompts}",
            "--best_of=8",
            *("--height=64", "--width=128", "--steps=10", "--guidance=2", "--solver=euler"),
            *("--dtype=float32", f"--workers={2 * FLAGS.workers}"),
            "--judge=benchmarks.hacking_rewards:SecondReader",
            f"--out={folder / name}/sign.png",
            *pruning,
        )

    pruned = [
        choose(f"at_{level}", f"--prune_head={head}", f"--prune_at={level}") for level in LEVELS
    ]
    return Job("best of 8", folder, (train_head, choose("all"), *pruned))


@dataclasses.dataclass
class Running:
    """A job that runs. process: of its command `number`. began: the time of its first one."""

    job: Job
    process: subprocess.Popen
    began: float
    number: int = 0
    why: str = ""

    @classmethod
    def start(cls, job: Job) -> "Running":
        job.folder.mkdir(parents=True, exist_ok=True)
        return cls(job, launch(job, 0), time.monotonic())

    def went_on(self) -> bool:
        """Return whether the job runs, after starting its next command if one has ended well."""
        code = self.process.poll()
        if code is None:
            return True
        self.number += 1
        if code or self.why:
            self.why = self.why or f"ended with {code}"
            return False
        if self.number == len(self.job.commands):
            self.job.done.write_text(self.job.text)
            self.why = "finished"
            return False
        self.process = launch(self.job, self.number)
        return True

    def stop(self, why: str) -> None:
        """Ask the command to end, which saves what it has."""
        self.why = self.why or why
        self.process.terminate()

    def kill(self) -> None:
        """End the command with the processes that it has started."""
        try:
            self.process.wait(GRACE)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def launch(job: Job, number: int) -> subprocess.Popen:
    """Start a command of a job in a process group of its own. The first one begins a new log, in
    which `hacking_tables` would take the results of an earlier attempt for further ones.
    """
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    with job.log.open("ab" if number else "wb") as output:
        return subprocess.Popen(
            job.commands[number],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )


def run(jobs: Sequence[Job], after_each: Callable[[], None], FLAGS, deadline: float) -> None:
    """Run jobs, some at a time, until the deadline. after_each: called when one has ended."""
    waiting, running = list(jobs), []
    while (waiting or running) and time.monotonic() < deadline:
        # the first one alone until it has compiled and encoded what the others find in caches
        alone = len(running) == 1 and len(waiting) == len(jobs) - 1
        ready = not alone or (running[0].job.folder / run_log.EVALUATIONS).exists()
        if waiting and len(running) < FLAGS.jobs and ready:
            running.append(Running.start(waiting.pop(0)))
            print(f"started {running[-1].job.name}", flush=True)
            continue
        time.sleep(POLL)
        for each in running:
            if time.monotonic() - each.began > FLAGS.limit:
                each.stop("too long")
        ended = [each for each in running if not each.went_on()]
        running = [each for each in running if each not in ended]
        for each in ended:
            print(f"{each.why}: {each.job.name}, {time.monotonic() - each.began:.0f} s", flush=True)
        if ended:
            after_each()
    for each in running:
        each.stop("out of time")
        print(f"{each.why}: {each.job.name}", flush=True)
    for each in running:
        each.kill()
    after_each()


def main(_) -> None:
    FLAGS = flags.FLAGS
    began = time.monotonic()
    out = pathlib.Path(FLAGS.out).absolute()
    out.mkdir(parents=True, exist_ok=True)
    if not MODEL.exists():
        arguments = ("--src", "assets/tiny-wan", "--dst", MODEL, "--dtype", "float32")
        subprocess.run(module("convert.from_diffusers", *arguments), check=True)
    jax.config.update("jax_platforms", "cpu")  # the runs have the device
    write_two_texts(out / "prompts")
    seeds = range(FLAGS.seeds)
    jobs = [
        training(case, seed, out, FLAGS)
        for case in CASES
        if case.question in FLAGS.only or case.name in FLAGS.only
        for seed in seeds[: case.seeds]
    ]
    if "f" in FLAGS.only:
        jobs.append(best_of(out, FLAGS))
    jobs = [job for job in jobs if not job.finished()]

    def write() -> None:
        hacking_tables.write(out)

    run(jobs, write, FLAGS, began + FLAGS.seconds)
    print((out / hacking_tables.TABLES).read_text(), flush=True)


if __name__ == "__main__":
    flags.DEFINE_string("out", None, "folder of the runs and the tables", required=True)
    flags.DEFINE_list("only", list("abcdef"), "questions, or names of cases")
    flags.DEFINE_integer("jobs", 6, "runs at a time", lower_bound=1)
    flags.DEFINE_integer("workers", 2, "scoring processes of each run", lower_bound=1)
    flags.DEFINE_float("seconds", 480, "after which no run goes on")
    flags.DEFINE_float("limit", 400, "seconds of one run")
    flags.DEFINE_integer("seeds", 3, "runs of each case, at most", lower_bound=1)
    flags.DEFINE_integer("epochs", 0, "of each run, at most; 0: those of its case", lower_bound=0)
    flags.DEFINE_integer("prompts", 128, "held-out prompts of each evaluation", lower_bound=2)
    flags.DEFINE_integer("head_videos", 2048, "of the reward head", lower_bound=16)
    flags.DEFINE_integer("head_updates", 2000, "of the reward head", lower_bound=1)
    flags.DEFINE_list("common", [], "KEY=VALUE of all runs")
    app.run(main)

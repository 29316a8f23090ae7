"""Samples N videos of each prompt and writes the one with the best reward. It also takes the flags of
`python -m wan_jax.sample` except --samples, --grid and --noise.

    python -m grpo.best_of --model models/tiny-wan --prompt 'A red sign with the word "open".' \\
        --best_of 8 --height 64 --width 128 --out open.png
    python -m grpo.best_of --model models/tiny-wan --prompts prompts.txt --best_of 8 \\
        --reward redness:Redness --judge rapidocr --out signs.png

The highest of N readings is too high, because it also chooses the errors of the reader; `--judge` names
another one, whose mean is the number to report. Without it the command says that the same reader chose.

With `--prune_head`, a file of `grpo.reward_head`, the candidates are ranked by their predicted reward
at the noise level `--prune_at`, and only the better half of each prompt's candidates is finished.
"""

import dataclasses
import functools
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence

import numpy as np
from absl import flags
from tqdm import tqdm

from grpo.data.prompts import PromptSet, load_prompts
from grpo.scoring.best_of import best_candidate, curve, finite_mean
from grpo.scoring.reward_pool import open_pool
from grpo.scoring.scored_prompts import for_rewards, targets_check
from grpo.settings.schema import SECOND_READER, main_reward
from grpo.settings.sections.reward import Reward
from rewards.base import last_line
from rewards.batch_scores import BatchScores, PendingScores
from rewards.choices import ENGINES, RULES
from rewards.ocr.targets import TargetError, parse_targets
from rewards.own import TARGET
from rewards.pool_set import PendingSet, Pool
from wan_jax import sample as sampling_command
from wan_jax.command_line import cli
from wan_jax.command_line.flag_types import check_used, define_number, define_path
from wan_jax.command_line.limits import CANDIDATES, PROCESSES, Range
from wan_jax.distributed import memory
from wan_jax.errors import UserError
from wan_jax.inference import pipeline, pruning, reward_guidance, sampling
from wan_jax.models import precision
from wan_jax.storage import media

OCR = "ocr"
define_number("best_of", 4, "candidates of each prompt", Range(2, CANDIDATES.high), int)
flags.DEFINE_string(
    "reward",
    "ocr",
    "what chooses: ocr, or your own reward, MODULE:FACTORY (docs/howto/own_rewards.md)",
)
flags.DEFINE_enum("rule", RULES[0], RULES, "rule of ocr")
flags.DEFINE_enum("engine", ENGINES[0], ENGINES, "OCR engine of --reward=ocr")
flags.DEFINE_string(
    "judge",
    "",
    f"reader that does not choose and gives the number to report: {', '.join(ENGINES)}, or MODULE:FACTORY",
)
define_path(
    "prune_head", "file of grpo.reward_head: only the better half of the candidates is finished"
)
define_number(
    "prune_at",
    0.7,
    "noise level at which --prune_head ranks the candidates",
    Range(0, 1, above=True),
)
flags.DEFINE_bool("keep_all", False, "also write the other candidates, with their numbers")
define_number("workers", 2, "scoring processes", PROCESSES, int)
FLAGS = flags.FLAGS


@dataclasses.dataclass(frozen=True)
class Readers:
    """What scores the candidates.

    Attributes:
        config: settings of the rewards.
        weights: by name; the judge's is 0.
        judge: name of the reward that does not choose; "": none.
    """

    config: Reward
    weights: dict[str, float]
    judge: str

    @property
    def chooser(self) -> str:
        """The name of the reward that chooses."""
        return main_reward(self.weights)


@dataclasses.dataclass(frozen=True)
class Candidates:
    """The finished candidates of a prompt, of which some may have been pruned before.

    Attributes:
        prompt: its number.
        numbers: of the candidates among those of the prompt, int [n].
        videos: in the same order.
        scores: of the finite videos.
    """

    prompt: int
    numbers: list[int]
    videos: pipeline.Videos
    scores: PendingScores | PendingSet | None


@dataclasses.dataclass(frozen=True)
class Choice:
    """The scores of the candidates of a prompt: nan where one has none.

    Attributes:
        chooser, judge: float64 [n].
        texts: that were read in them.
        error: the last one, "" without any.
    """

    chooser: np.ndarray
    judge: np.ndarray
    texts: list[str]
    error: str

    @property
    def best(self) -> int:
        """The index of the candidate that is chosen."""
        return int(best_candidate(self.chooser[None])[0])


def main(_):
    cli.enable_compilation_cache()

    # ---- 1. check every setting before hours of work -------------------------------------------
    check_used(FLAGS, without_effect())
    readers = checked_readers(FLAGS.reward, FLAGS.judge)
    with cli.user_input():
        request = checked_request()
    prompts = checked_prompts(request, readers)
    files = Files(pathlib.Path(FLAGS.out), request, FLAGS.keep_all)
    with cli.user_input():
        files.check_writable()
    precision.use(request.place.precision)
    print(sampling_command.describe(request), flush=True)
    start = time.monotonic()

    with open_pool(readers.config, readers.weights) as pool:
        # ---- 2. encode the prompts, load the networks ------------------------------------------
        bar = functools.partial(tqdm, desc="prompts", leave=False, disable=not sys.stderr.isatty())
        table = sampling.encode(request, bar)
        networks = sampling.load(request)

        # ---- 3. sample and score; a prompt's best candidate is written once all are scored -----
        found = []
        batches = sampling.sample(request, table, networks)
        for candidates in pipeline.one_ahead(by_prompt(request, batches, pool, prompts.targets)):
            choice = choose(candidates, readers)
            files.write(candidates, choice, readers)
            found.append(choice)

    # ---- 4. report -----------------------------------------------------------------------------
    print(*summary(found, readers, request), sep="\n")
    print(f"{time.monotonic() - start:.1f} s, compilation included; {memory.peaks()}")
    lost = [i for i, choice in enumerate(found) if np.isnan(choice.chooser).all()]
    if lost:
        raise UserError(
            f"{len(lost)} of {len(found)} prompts have no candidate with a score, nothing was "
            f"written for them, e.g. {request.prompts[lost[0]]!r}: {found[lost[0]].error}"
        )


def without_effect() -> dict[str, str]:
    """Return the flags that have no effect with the other ones, each with what it needs."""
    other = "python -m wan_jax.sample"
    needs = (
        ("samples", f"{other}; here --best_of is the number of samples", False),
        ("grid", other, False),
        ("noise", other, False),
        ("prune_at", "--prune_head", FLAGS.prune_head is not None),
        ("rule", "--reward=ocr", FLAGS.reward == OCR or FLAGS.judge in ENGINES),
        ("engine", "--reward=ocr", FLAGS.reward == OCR),
    )
    return {name: needed for name, needed, has_effect in needs if not has_effect}


def checked_readers(reward: str, judge: str) -> Readers:
    """Return what chooses and what judges. Raises `UserError` where one is unknown, or both are the
    same.
    """
    for flag, value, names in (("reward", reward, (OCR,)), ("judge", judge, ("", *ENGINES))):
        if value not in names and not TARGET.fullmatch(value):
            raise UserError(
                f"--{flag}={value} is unknown: choose {', '.join(filter(None, names))} or your own "
                "reward as MODULE:FACTORY, such as redness:Redness"
            )
    if judge == (FLAGS.engine if reward == OCR else reward):
        raise UserError(f"--judge={judge} is what chooses: name another one, or leave out --judge")
    own, engine, second = {}, FLAGS.engine, ""
    weights: dict[str, float] = {OCR: 1.0}
    if reward != OCR:
        own, weights = {"reward": reward}, {"reward": 1.0}
    name = ""
    if judge in ENGINES and reward == OCR:
        name, second = SECOND_READER, judge
    elif judge in ENGINES:
        name, engine = OCR, judge
    elif judge:
        name, own = "judge", own | {"judge": judge}
    if name:
        weights[name] = 0.0
    config = Reward(
        rule=FLAGS.rule,
        engine=engine,
        second_engine=second,
        own=tuple(own.items()),
        workers=FLAGS.workers,
    )
    return Readers(config, weights, name)


def checked_request() -> sampling.SampleRequest:
    """Return what the flags ask for, with the pruning. Raises as `wan_jax.sample.checked_request`."""
    request = sampling_command.checked_request(FLAGS.best_of)
    if FLAGS.prune_head is None:
        return request
    head = reward_guidance.load_head(
        FLAGS.prune_head, request.model.config("transformer"), request.model
    )
    sigmas = request.settings.make_solver().schedule.sigmas
    step, keep = pruning.step_at(sigmas, FLAGS.prune_at), -(-FLAGS.best_of // 2)
    return dataclasses.replace(request, pruning=pruning.Pruning(head, step, keep))


def checked_prompts(request: sampling.SampleRequest, readers: Readers) -> PromptSet:
    """Return the request's prompts with what the rewards ask of them. Raises `UserError` where a
    prompt has no text that `ocr` could read.
    """
    needed = OCR in readers.weights
    check = targets_check(readers.config) if needed else None

    def parse(prompt: str) -> tuple[str, ...]:
        try:
            return parse_targets(prompt)
        except TargetError:
            if needed:
                raise
            return ()

    known: dict[str, tuple] = {}
    if FLAGS.prompts:
        read = load_prompts(FLAGS.prompts, parse, check=check, remedy="--prompts: correct the file")
        known = dict(zip(read.prompts, zip(read.targets, read.metadata)))
    for prompt in FLAGS.prompt:
        with cli.user_input():
            targets = parse(prompt.strip())
            if check is not None:
                check(targets)
        known.setdefault(prompt, (targets, {}))
    targets, metadata = zip(*(known[prompt] for prompt in request.prompts))
    prompts = PromptSet(request.prompts, targets, metadata)
    return for_rewards(prompts, readers.weights, request.settings.fps)


def by_prompt(
    request: sampling.SampleRequest,
    batches: Iterator[sampling.Batch],
    pool: Pool,
    records: Sequence,
) -> Iterator[Candidates]:
    """Yield the candidates of each prompt as soon as all are finished, while they are scored.

    records: of the prompts, for the rewards. A reward that compares videos gets those of a prompt
    together.
    """
    waiting: list[tuple[int, np.ndarray, bool]] = []
    count = request.finished_per_prompt
    for batch in batches:
        waiting += zip(batch.rows.tolist(), batch.videos.frames, batch.videos.finite)
        while len(waiting) >= count:
            ready, waiting = waiting[:count], waiting[count:]
            numbers, frames, finite = zip(*ready)
            videos = pipeline.Videos(np.stack(frames), np.array(finite))
            prompt, scored = numbers[0] // request.samples, int(videos.finite.sum())
            scores = None
            if scored:
                scores = pool.submit(
                    videos.frames[videos.finite],
                    [records[prompt]] * scored,
                    [prompt] * scored,
                    scored,
                )
            yield Candidates(prompt, [n % request.samples for n in numbers], videos, scores)


def choose(candidates: Candidates, readers: Readers) -> Choice:
    """Wait for the scores of a prompt's candidates."""
    finite = candidates.videos.finite
    chooser, judge = np.full((2, len(finite)), np.nan)
    texts, error = [""] * len(finite), pipeline.NOT_FINITE
    if candidates.scores is not None:
        scores: BatchScores = candidates.scores.result()
        chooser[finite] = scores.values
        if readers.judge in scores.parts:
            judge[finite] = scores.parts[readers.judge]
        for i, text in zip(np.flatnonzero(finite), scores.texts):
            texts[i] = text
        error = next((last_line(e) for e in reversed(scores.errors) if e), "")
    return Choice(chooser, judge, texts, error)


def summary(
    found: Sequence[Choice], readers: Readers, request: sampling.SampleRequest
) -> list[str]:
    """Return the lines about all prompts: the means, and the means over N where nothing was pruned."""
    chooser = np.stack([choice.chooser for choice in found])
    judged = np.stack([choice.judge for choice in found]) if readers.judge else chooser
    points = curve(chooser, judged)
    name = readers.judge or readers.chooser
    lines = []
    if request.pruning is not None:
        steps, step = request.settings.steps, request.pruning.step
        sigma = float(request.settings.make_solver().schedule.sigmas[step])
        saved = (1 - step / steps) * (1 - request.pruning.keep / request.samples)
        lines.append(
            f"{request.pruning.keep} of {request.samples} candidates went on after {step} of {steps} "
            f"steps, at noise level {sigma:.2f}: {saved:.0%} of the model evaluations saved"
        )
        points = points[-1:]
    else:
        lines += [
            f"best of {p['candidates']}: {name} {p['judge']:.3f} on {len(found)} prompt(s)"
            for p in points[:-1]
        ]
    best = points[-1]
    lines.append(
        f"best of {request.samples}: {name} {best['judge']:.3f} on {len(found)} prompt(s); all "
        f"candidates {finite_mean(judged):.3f}"
    )
    if readers.judge:
        lines.append(f"chosen by {readers.chooser}, which reads {best['chooser']:.3f}")
    else:
        lines.append(
            f"the same reader ({name}) chose, so the numbers are too high: --judge names another one"
        )
    return lines


class Files:
    """The files of a command: the best candidate of each prompt, and the others if all are kept."""

    def __init__(self, out: pathlib.Path, request: sampling.SampleRequest, keep_all: bool):
        self.out, self.request, self.keep_all = out, request, keep_all

    def path(self, prompt: int, candidate: int | None = None) -> pathlib.Path:
        """Return the file of a prompt's best candidate, or of another candidate."""
        number = f"_{prompt:03d}" if len(self.request.prompts) > 1 else ""
        ending = "" if candidate is None else f"_candidate_{candidate:02d}"
        return self.out.with_name(f"{self.out.stem}{number}{ending}{self.out.suffix}")

    def check_writable(self) -> None:
        """Raise ValueError when a file cannot be written, before hours of work."""
        request = self.request
        others = range(request.samples) if self.keep_all else ()
        for i in range(len(request.prompts)):
            for path in (self.path(i), *(self.path(i, other) for other in others)):
                media.check_no_folder(path)
        media.check_writable(
            self.path(0), request.frames, request.height, request.width, request.settings.fps
        )

    def write(self, candidates: Candidates, choice: Choice, readers: Readers) -> None:
        """Write a prompt's files, and print the values of its candidates."""
        best, prompt, fps = choice.best, candidates.prompt, self.request.settings.fps
        scored = not np.isnan(choice.chooser).all()
        for i, number in enumerate(candidates.numbers):
            chosen = scored and i == best
            if candidates.videos.finite[i] and (chosen or self.keep_all):
                path = self.path(prompt, None if chosen else number)
                media.write(path, candidates.videos.frames[i], fps)
        values = " ".join(f"{value:.3f}" for value in choice.chooser)
        if not scored:
            print(f"no file  {self.request.prompts[prompt]}: {choice.error}", flush=True)
            return
        judged = f", {readers.judge} {choice.judge[best]:.3f}" if readers.judge else ""
        read = f", read {choice.texts[best]!r}" if choice.texts[best] else ""
        print(
            f"{self.path(prompt)}  {self.request.prompts[prompt]}\n  candidate "
            f"{candidates.numbers[best]}: {readers.chooser} {choice.chooser[best]:.3f}{judged}{read}; "
            f"candidates {', '.join(map(str, candidates.numbers))}: {values}",
            flush=True,
        )


if __name__ == "__main__":
    cli.run(main)

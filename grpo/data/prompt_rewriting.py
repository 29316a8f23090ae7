"""Rewrites prompts by a chat model, and refuses every rewrite that changes the texts to be written.

A rewritten prompt is scored against the original's targets, so its quoted texts must be the same, in
the same order. One that differs, has no quotes, or is empty is replaced by the original. Answers are
stored by the content of the request, so that a second pass costs nothing and gives the same file.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import pathlib
from collections import Counter
from collections.abc import Callable, Iterable

from grpo.data.prompts import PromptSet
from grpo.records.run_files import write_atomically
from rewards.ocr.targets import TargetError, parse_targets
from wan_jax.models.tokenizer import clean

AT_A_TIME = 16  # requests
INSTRUCTION = (
    "Rewrite the following prompt of a text-to-video model as one paragraph of 60 to 100 words in the "
    "language of the prompt. Add details of surroundings, light, movement and camera. Keep every "
    "quoted text exactly as it is, in double quotes, in the same order, and quote nothing else. "
    "Answer with the new prompt only.\n\n"
)


@dataclasses.dataclass(frozen=True)
class Rewrites:
    """The result for P prompts.

    Attributes:
        prompts: rewritten, or the original where the rewrite was refused.
        refused: why rewrites were refused, with their number.
        asked: number of requests; the other answers were stored.
        example: a refused rewrite, or "".
    """

    prompts: tuple[str, ...]
    refused: Counter[str]
    asked: int
    example: str


def rewrite(
    prompts: PromptSet, ask: Callable[[str], str], model: str, cache: pathlib.Path, wrap: Callable
) -> Rewrites:
    """Rewrite prompts with targets.

    ask: question -> the model's answer. model: its name, part of the stored answers' key. cache: folder
    of the stored answers. wrap: wraps the iterator over the answers, e.g. `tqdm`; called with
    their number as `total`. `ask` is called by several threads. Raises what it raises; the answers
    until then are stored.
    """
    refused: Counter[str] = Counter()
    written: list[str] = []
    asked, example = 0, ""
    taken = set(map(clean, prompts.prompts))
    cache.mkdir(parents=True, exist_ok=True)

    def answer_to(prompt: str) -> tuple[str, bool]:
        """Return the answer, and whether the model was asked."""
        key = hashlib.sha256(json.dumps([model, INSTRUCTION, prompt]).encode()).hexdigest()
        file = cache / f"{key}.txt"
        known = file.is_file()
        if not known:
            write_atomically(file, ask(INSTRUCTION + prompt).encode())
        return " ".join(file.read_text(encoding="utf-8").split()), not known

    with concurrent.futures.ThreadPoolExecutor(AT_A_TIME) as threads:
        answers = list(wrap(threads.map(answer_to, prompts.prompts), total=len(prompts)))
    for prompt, targets, (answer, new) in zip(prompts.prompts, prompts.targets, answers):
        asked += new
        reason = problem(answer, targets)
        if not reason and clean(answer) in taken:
            reason = "the same as another prompt"
        if reason:
            refused[reason] += 1
            example = example or answer
        else:
            taken.add(clean(answer))
        written.append(prompt if reason else answer)
    return Rewrites(tuple(written), refused, asked, example)


def problem(answer: str, targets: Iterable[str]) -> str:
    """Return why a rewrite is refused, "" if it is not: it must quote the targets, in their order, and
    nothing else.
    """
    if not answer:
        return "empty"
    try:
        found = parse_targets(answer)
    except TargetError:
        return "no quoted text, or an unpaired quote"
    return "" if found == tuple(targets) else "other quoted texts"

"""Prompt sets: text files of one prompt a line, checked when they are loaded, and which prompts an epoch uses."""

import dataclasses
import pathlib
from collections.abc import Callable

import numpy as np

from wan_jax.cli import UserError


@dataclasses.dataclass(frozen=True)
class PromptSet:
    prompts: tuple[str, ...]
    targets: tuple[tuple[str, ...], ...]  # the texts each prompt asks for, in order

    def __len__(self):
        return len(self.prompts)


def load_prompts(path, parse: Callable[[str], tuple[str, ...]], limit: int | None = None) -> PromptSet:
    """Reads a prompt file; empty lines and lines that start with '#' are skipped, repeats are dropped.

    parse: a prompt's targets, raising ValueError where there are none (`rewards.targets.parse_targets`). Every bad
    line is reported at once, before any model is loaded. limit takes the first so many. Raises `UserError`.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"prompt file {path} does not exist; give a text file with one prompt a line")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"prompt file {path} is not UTF-8 text ({error}); save it as UTF-8") from None
    found, problems = {}, []
    for number, line in enumerate(lines, 1):
        prompt = line.strip()
        if not prompt or prompt.startswith("#") or prompt in found:
            continue
        try:
            found[prompt] = tuple(parse(prompt))
        except ValueError as error:
            problems.append(f"  line {number}: {error}")
    if problems:
        shown = "\n".join(problems[:5]) + (f"\n  and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise UserError(f"{path}: {len(problems)} of {len(lines)} lines cannot be scored:\n{shown}")
    if not found:
        raise UserError(f"{path} holds no prompt")
    prompts = tuple(found)[:limit]
    return PromptSet(prompts, tuple(found[p] for p in prompts))


def epoch_prompts(seed: int, epoch: int, total: int, groups: int) -> np.ndarray:
    """Indices [groups] of the prompts of an epoch: distinct, and a function of (seed, epoch) alone.

    Passes over the prompt set are shuffled one after the other, so every prompt comes up equally often. Raises
    `UserError` when there are fewer prompts than groups.
    """
    if groups > total:
        raise UserError(f"sample.groups={groups} needs as many prompts, the file has {total}; lower sample.groups")
    per_pass = total // groups
    shuffled = np.random.default_rng([seed, epoch // per_pass, 0x960]).permutation(total)
    start = (epoch % per_pass) * groups
    return shuffled[start : start + groups]

"""Prompt sets: files of prompts, checked when they are loaded, and which prompts an epoch uses.

    prompts.txt     one prompt a line; empty lines and lines that start with '#' are skipped
    prompts.jsonl   {"prompt": "...", "targets": ["..."], ...} a line; without targets they are read from the prompt's
                    quotes, and any other fields are kept as they are
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable

import numpy as np

from wan_jax.cli import UserError


@dataclasses.dataclass(frozen=True)
class PromptSet:
    prompts: tuple[str, ...]
    targets: tuple  # the texts each prompt asks for, in order: tuple[str, ...]; or `Asked`, these and the prompt
    metadata: tuple[dict, ...] = ()  # each prompt's other fields

    def __len__(self):
        return len(self.prompts)


def load_prompts(path, parse: Callable[[str], tuple[str, ...]], limit: int | None = None) -> PromptSet:
    """Reads a prompt file, JSON lines where its name ends in .jsonl; repeated prompts are dropped.

    parse: a prompt's targets, raising ValueError where there are none (`rewards.targets.parse_targets`). Every bad
    line is reported at once, before any model is loaded. limit takes the first so many. Raises `UserError`.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"prompt file {path} does not exist; give a text file with one prompt a line, or JSON lines")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"prompt file {path} is not UTF-8 text ({error}); save it as UTF-8") from None
    read = _from_json if path.suffix == ".jsonl" else _from_text
    found, problems = {}, []
    for number, line in enumerate(lines, 1):
        try:
            entry = read(line.strip())
            if entry is None or entry[0] in found:
                continue
            prompt, targets, metadata = entry
            found[prompt] = (targets or tuple(parse(prompt)), metadata)
        except ValueError as error:
            problems.append(f"  line {number}: {error}")
    if problems:
        shown = "\n".join(problems[:5]) + (f"\n  and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise UserError(f"{path}: {len(problems)} of {len(lines)} lines cannot be scored:\n{shown}")
    if not found:
        raise UserError(f"{path} holds no prompt")
    prompts = tuple(found)[:limit]
    targets, metadata = zip(*(found[prompt] for prompt in prompts))
    return PromptSet(prompts, targets, metadata)


def _from_text(line: str) -> tuple[str, tuple, dict] | None:
    return None if not line or line.startswith("#") else (line, (), {})


def _from_json(line: str) -> tuple[str, tuple[str, ...], dict] | None:
    """(prompt, targets, other fields). Raises ValueError on anything else."""
    if not line:
        return None
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error})") from None
    prompt = fields.pop("prompt", None) if isinstance(fields, dict) else None
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError('no "prompt": a line is {"prompt": "...", "targets": ["..."]}')
    targets = fields.pop("targets", [])
    if not isinstance(targets, list) or not all(isinstance(t, str) and t.strip() for t in targets):
        raise ValueError(f'"targets" is {targets!r}: give a list of texts that are not blank')
    return prompt.strip(), tuple(targets), fields


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

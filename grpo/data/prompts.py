"""Prompt sets: files of prompts, checked when they are loaded, and which prompts an epoch uses.

    prompts.txt     one prompt a line; empty lines and lines that start with '#' are skipped
    prompts.jsonl   {"prompt": "...", "targets": ["..."], ...} a line; without targets they are read
                    from the prompt's
                    quotes, and any other fields are kept as they are; .ndjson is the same

Files are UTF-8, with or without a byte order mark. Any other suffix is read as text, except those
of formats that are not read.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable

import numpy as np

from rewards.ocr.text_match import visible
from wan_jax.command_line import cli
from wan_jax.errors import UserError
from wan_jax.models.tokenizer import clean

JSON_LINES = (".jsonl", ".ndjson")
NOT_READ = (".json", ".csv", ".tsv", ".parquet")
READ = 'give a text file with one prompt a line, or JSON lines, {"prompt": "..."} each, as .jsonl or .ndjson'


@dataclasses.dataclass(frozen=True)
class PromptSet:
    prompts: tuple[str, ...]
    # the texts each prompt asks for, in order: tuple[str, ...]; or `Asked`, these and the prompt
    targets: tuple
    metadata: tuple[dict, ...] = ()  # each prompt's other fields

    def __len__(self):
        return len(self.prompts)


def load_prompts(
    path,
    parse: Callable[[str], tuple[str, ...]],
    limit: int | None = None,
    check: Callable[[tuple[str, ...]], None] | None = None,
) -> PromptSet:
    """Read a prompt file as its suffix says; repeated prompts are dropped.

    parse: a prompt's targets, raising ValueError where there are none
    (`rewards.ocr.targets.parse_targets`). check: raises ValueError on targets that cannot be
    scored. Every bad line is reported at once, before any model is loaded. limit: how many are
    taken. Raises `UserError`.
    """
    path = pathlib.Path(path)
    kind = path.suffix.lower()
    if kind in NOT_READ:
        raise UserError(f"prompt file {path}: {kind} files are not read; {READ}")
    text = cli.read_text(path, "prompt file", READ)
    if kind not in JSON_LINES:
        _check_no_json(text, path)
    # JSON may hold what `splitlines` takes for ends of lines
    lines = text.removesuffix("\n").split("\n")
    read = _from_json if kind in JSON_LINES else _from_text
    found, problems = {}, []
    for number, line in enumerate(lines, 1):
        try:
            entry = read(line.strip())
            if entry is None or entry[0] in found:
                continue
            prompt, targets, metadata = entry
            found[prompt] = (targets or tuple(parse(prompt)), metadata)
            if check is not None:
                check(found[prompt][0])
        except ValueError as error:
            problems.append(f"  line {number}: {error}")
    if problems:
        shown = "\n".join(problems[:5]) + (
            f"\n  and {len(problems) - 5} more" if len(problems) > 5 else ""
        )
        raise UserError(f"{path}: {len(problems)} of {len(lines)} lines cannot be scored:\n{shown}")
    if not found:
        raise UserError(f"{path} holds no prompt")
    prompts = tuple(found)[:limit]
    targets, metadata = zip(*(found[prompt] for prompt in prompts))
    return PromptSet(prompts, targets, metadata)


def examples(prompts: PromptSet, count: int = 2) -> list[str]:
    """Return lines that show what was read from the first prompts, so that a misread file is seen
    at the start.
    """
    pairs = zip(prompts.prompts[:count], prompts.targets)
    return [
        f"prompt: {prompt} -> {', '.join(map(repr, getattr(targets, 'targets', targets)))}"
        for prompt, targets in pairs
    ]


def _check_no_json(text: str, path: pathlib.Path) -> None:
    """Raise `UserError` where a file that is read as text is JSON, as a whole or in its first line."""
    first = next((line.strip() for line in text.split("\n") if line.strip()), "")
    if not first.startswith(("{", "[")):
        return
    for part in (first, text):
        try:
            json.loads(part)
        except json.JSONDecodeError:
            continue
        raise UserError(f"prompt file {path} is read as text, but holds JSON; {READ}")


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
    # as those that are read from the prompt
    targets = tuple(visible(clean(target)).strip() for target in targets)
    if "" in targets:
        raise ValueError('"targets" has a text without a character that can be seen')
    return prompt.strip(), targets, fields


def epoch_prompts(seed: int, epoch: int, total: int, groups: int) -> np.ndarray:
    """Indices [groups] of the prompts of an epoch: distinct, and a function of (seed, epoch) alone.

    Passes over the prompt set are shuffled one after the other, so every prompt comes up equally
    often. Raises `UserError` when there are fewer prompts than groups.
    """
    if groups > total:
        raise UserError(
            f"sample.groups={groups} needs as many prompts, the file has {total}; lower "
            "sample.groups"
        )
    per_pass = total // groups
    shuffled = np.random.default_rng([seed, epoch // per_pass, 0x960]).permutation(total)
    start = (epoch % per_pass) * groups
    return shuffled[start : start + groups]

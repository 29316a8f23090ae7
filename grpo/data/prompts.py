"""Reads and checks files of prompts, and chooses the prompts of an epoch.

    prompts.txt     one prompt per line; empty lines and lines that start with '#' are skipped
    prompts.jsonl   {"prompt": "...", "targets": ["..."], ...} per line, also .ndjson. Without
                    targets, they are the texts in the prompt's quotes. Other fields are metadata.

Files are UTF-8, with or without a byte order mark. Files with other suffixes are read as text,
except those in `NOT_READ`.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable

import numpy as np

from grpo.random_streams import Stream
from rewards.ocr.text_match import visible
from wan_jax.command_line import cli
from wan_jax.errors import UserError
from wan_jax.models.tokenizer import clean

JSON_LINES = (".jsonl", ".ndjson")
NOT_READ = (".json", ".csv", ".tsv", ".parquet")
READ = 'give a text file with one prompt a line, or JSON lines, {"prompt": "..."} each, as .jsonl or .ndjson'


@dataclasses.dataclass(frozen=True)
class PromptSet:
    """Prompts with what each asks for.

    Attributes:
      prompts: different texts.
      targets: per prompt the texts to write, tuple[str, ...]; or what else its rewards ask for.
      metadata: per prompt the other fields of its line.
    """

    prompts: tuple[str, ...]
    targets: tuple
    metadata: tuple[dict, ...] = ()

    def __len__(self):
        return len(self.prompts)


def load_prompts(
    path,
    parse: Callable[[str], tuple[str, ...]],
    limit: int | None = None,
    check: Callable[[tuple[str, ...]], None] | None = None,
) -> PromptSet:
    """Read a prompt file in the format of its suffix; repeated prompts are dropped.

    Args:
      path: of the file.
      parse: returns a prompt's targets, or raises ValueError if it has none
        (`rewards.ocr.targets.parse_targets`).
      limit: number of prompts to take; None: all.
      check: raises ValueError on targets that cannot be scored.

    Raises:
      UserError: the file cannot be read, has no prompt, or has lines that cannot be scored, which
        are reported together.
    """
    path = pathlib.Path(path)
    kind = path.suffix.lower()
    if kind in NOT_READ:
        raise UserError(f"prompt file {path}: {kind} files are not read; {READ}")
    text = cli.read_text(path, "prompt file", READ)
    if kind not in JSON_LINES:
        _check_no_json(text, path)
    # not `splitlines`, which also splits at characters that JSON allows within a line
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
        shown = "\n".join(problems[:5])
        if len(problems) > 5:
            shown += f"\n  and {len(problems) - 5} more"
        raise UserError(f"{path}: {len(problems)} of {len(lines)} lines cannot be scored:\n{shown}")
    if not found:
        raise UserError(f"{path} holds no prompt")
    prompts = tuple(found)[:limit]
    targets, metadata = zip(*(found[prompt] for prompt in prompts))
    return PromptSet(prompts, targets, metadata)


def examples(prompts: PromptSet, count: int = 2) -> list[str]:
    """Return a line for each of the first prompts, which shows a misread file at the start."""
    lines = []
    for prompt, targets in zip(prompts.prompts[:count], prompts.targets):
        texts = getattr(targets, "targets", targets)
        lines.append(f"prompt: {prompt} -> {', '.join(map(repr, texts))}")
    return lines


def _check_no_json(text: str, path: pathlib.Path) -> None:
    """Raise `UserError` if text is JSON, as a whole or in its first line."""
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
    """Return (prompt, no targets, no metadata); None if the line has no prompt."""
    return None if not line or line.startswith("#") else (line, (), {})


def _from_json(line: str) -> tuple[str, tuple[str, ...], dict] | None:
    """Return (prompt, targets, metadata); None for an empty line. Raises ValueError."""
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
    # cleaned like those that are read from the prompt
    targets = tuple(visible(clean(target)).strip() for target in targets)
    if "" in targets:
        raise ValueError('"targets" has a text without a character that can be seen')
    return prompt.strip(), targets, fields


def epoch_prompts(seed: int, epoch: int, total: int, groups: int) -> np.ndarray:
    """Return the indices [groups] of an epoch's prompts.

    They are different and determined by (seed, epoch). Epochs draw without replacement from a
    shuffled pass over the prompts; where `groups` does not divide `total`, a pass leaves out the
    remainder.

    Raises:
      UserError: there are fewer prompts than groups.
    """
    if groups > total:
        raise UserError(
            f"sample.groups={groups} needs as many prompts, the file has {total}; lower "
            "sample.groups"
        )
    per_pass = total // groups
    shuffled = Stream.PROMPT_ORDER.generator(seed, epoch // per_pass).permutation(total)
    start = (epoch % per_pass) * groups
    return shuffled[start : start + groups]

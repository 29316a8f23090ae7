"""Files of prompts, for sampling and for training.

    prompts.txt     one prompt per line; empty lines and lines that start with '#' are skipped
    prompts.jsonl   {"prompt": "...", ...} per line, also .ndjson

Files are UTF-8, with or without a byte order mark. Files with other suffixes are read as text,
except those in `NOT_READ`.
"""

import json
import pathlib
from collections.abc import Callable

from wan_jax.command_line import cli
from wan_jax.errors import UserError

JSON_LINES = (".jsonl", ".ndjson")
NOT_READ = (".json", ".csv", ".tsv", ".parquet")
READ = (
    'give a text file with one prompt a line, or JSON lines, {"prompt": "..."} each, as .jsonl or '
    ".ndjson"
)


def open_lines(path) -> tuple[list[str], Callable[[str], tuple[str, dict] | None]]:
    """Return the lines of a prompt file, and the function that reads one: (prompt, other fields),
    None if the line has no prompt; it raises ValueError.

    Raises `UserError` when the file cannot be read.
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
    return [line.strip() for line in lines], _from_json if kind in JSON_LINES else _from_text


def read_prompts(path) -> tuple[str, ...]:
    """Return the prompts of a file, each once, in order. Raises `UserError` when it cannot be read,
    has a line that is no prompt, or none that is.
    """
    lines, read = open_lines(path)
    prompts = {}
    for number, line in enumerate(lines, 1):
        try:
            entry = read(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {error}") from None
        if entry is not None:
            prompts[entry[0]] = None
    if not prompts:
        raise UserError(f"{path} holds no prompt")
    return tuple(prompts)


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


def _from_text(line: str) -> tuple[str, dict] | None:
    return None if not line or line.startswith("#") else (line, {})


def _from_json(line: str) -> tuple[str, dict] | None:
    if not line:
        return None
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error})") from None
    prompt = fields.pop("prompt", None) if isinstance(fields, dict) else None
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError('no "prompt": a line is {"prompt": "...", "targets": ["..."]}')
    return prompt.strip(), fields

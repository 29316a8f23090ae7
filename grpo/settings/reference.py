"""Writes the reference of all settings: Markdown (docs/reference/settings.md), or text for a terminal."""

import inspect
import math
import textwrap

from grpo.settings.schema import SETTINGS, sections
from grpo.settings.setting import Setting
from wan_jax.errors import UserError

HEAD = """# Settings of a recipe

Written by `python -m grpo.settings > docs/reference/settings.md`; the settings are in `grpo/settings/sections/`.
`python -m grpo.settings WORD` prints those with the word in their key or meaning. A recipe (`configs/*.py`) begins with
`defaults()` and changes a few of them, and each can be given on the command line: `--config.train.learning_rate=3e-5`,
a tuple as `--config.reward.panel=dark,edges`.
The methods and their measured effects: [methods](../explanation/algorithms.md), [results](../results.md).

*Experimental* marks settings and values for which no gain has been measured: one seed, or a difference within the
spread of the seeds. *Continuing* marks settings that a run may change when it is continued,
*per process* those in which the processes of a run on several hosts may differ.
"""
FLAG_HELP = (  # of --config
    "recipe, e.g. configs/tiny_ocr.py; each of its settings can be given as --config.KEY=VALUE "
    "(docs/reference/settings.md, or python -m grpo.settings)"
)
TYPES = {int: "whole number", float: "number", bool: "True or False", str: "text", tuple: "pair"}


def markdown(word: str = "") -> str:
    """Return a heading and a table for each section, with the settings that have `word` in their key
    or meaning; upper and lower case are equal. With an empty word it returns all settings, below an
    introduction. Raises `UserError` where no setting has the word.
    """
    pages = []
    for prefix, section in sections():
        if entries := [
            e for e in _matching(word) if e.key.rpartition(".")[0] == prefix.rstrip(".")
        ]:
            rows = "\n".join(map(_row, entries))
            summary = (inspect.getdoc(section) or "").partition("\n\n")[0]
            pages.append(
                f"## {prefix.rstrip('.') or 'run'}\n\n{summary}\n\n"
                f"| key | type | default | allowed | meaning |\n|---|---|---|---|---|\n{rows}\n"
            )
    return "\n".join(pages if word else [HEAD, *pages])


def listing(word: str = "") -> str:
    """Return the settings that `markdown` returns, as text of at most 100 columns: key, default,
    type and allowed values, and below that the meaning. Those whose key begins with the word come first,
    then those that have it in their key.
    """
    lines, start = [], word.lower()

    def order(entry):
        return not entry.key.startswith(start), start not in entry.key

    for entry in sorted(_matching(word), key=order):
        details = "; ".join(filter(None, (_type(entry), _allowed(entry).replace("`", ""))))
        for text, indent in (
            (f"{entry.key}={entry.default!r}  ({details})", ""),
            (_meaning(entry), "    "),
        ):
            lines += textwrap.wrap(
                text.replace("*", ""), 100, initial_indent=indent, subsequent_indent="    "
            )
    return "\n".join(lines) + "\n"


def _matching(word: str) -> list[Setting]:
    """Return the settings with the word in their key or meaning. Raises `UserError` if none has."""
    found = [e for e in SETTINGS.values() if word.lower() in f"{e.key} {e.meaning}".lower()]
    if not found:
        raise UserError(f"no setting has {word!r} in its key or meaning")
    return found


def _meaning(entry: Setting) -> str:
    """Return the meaning of a setting with its marks."""
    meaning = entry.meaning
    if entry.experimental:
        values = entry.experimental if isinstance(entry.experimental, tuple) else ()
        meaning += f" *Experimental{': ' if values else ''}{', '.join(values)}.*"
    if entry.resume:
        meaning += " *Continuing.*"
    if entry.per_process:
        meaning += " *Per process.*"
    return meaning


def _row(entry: Setting) -> str:
    """Return the row of a setting in its table."""
    meaning = _meaning(entry)
    cells = (f"`{entry.key}`", _type(entry), f"`{entry.default!r}`", _allowed(entry), meaning)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _type(entry: Setting) -> str:
    """Return the type of a setting as text."""
    if entry.named:
        return f"{TYPES[entry.named]}s by name"
    if entry.elements is None:
        return "path" if entry.path else TYPES[entry.kind]
    if entry.elements is tuple and entry.form:
        return "tuple of tuples"
    return f"tuple of {TYPES[entry.elements]}s"


def _allowed(entry: Setting) -> str:
    """Return the allowed values as text: choices, range, form of a tuple, None."""
    parts = []
    if entry.choices:
        parts.append(", ".join(f"`{choice}`" if choice else "empty" for choice in entry.choices))
    if entry.form:
        parts.append(entry.form)
    if entry.bounds:
        parts.append(entry.bounds.requirement(0.0).partition(";")[0].removeprefix("must be "))
        if math.inf in entry.bounds:
            parts.append("`inf`")
    if entry.required:
        parts.append("not empty")
    if entry.optional:
        parts.append("`None`")
    return "; ".join(parts)

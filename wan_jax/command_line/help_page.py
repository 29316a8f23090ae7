"""The help of a command on one screen: what it does, an example, its flags."""

import textwrap
from collections.abc import Sequence

from absl import flags

from wan_jax.command_line.flag_source import Source

WIDTH = 100  # columns of a page
INDENT = 20  # columns of the names of flags
HEAD = "Flags, with their [defaults]:"
END = "-h: this page, --helpfull: all of it, --completion bash|zsh: docs/reference/command_line.md"
SETTINGS = "list the settings with this word in their key or meaning, or all of them, and end"
REPEATED = "repeat this option to specify a list of values"  # absl adds it


def page(source: Source, defined: Sequence[flags.Flag], full: bool = False) -> str:
    """Return the help of a command.

    full: with the whole description; otherwise its first paragraph and the examples below it.
    """
    summary, *others = source.description.strip().split("\n\n")
    if not full:
        others = [text for text in others if text.startswith("    ")][:1]
    rows = [_row(f"--[no]{f.name}" if f.boolean else f"--{f.name}", _text(f)) for f in defined]
    if "config" in source.names:
        rows.insert(1, _row("--settings [WORD]", SETTINGS))
    return "\n".join(
        ["\n\n".join([textwrap.fill(summary, WIDTH), *others]), "", HEAD, *rows, "", END]
    )


def is_required(flag: flags.Flag) -> bool:
    """Return whether absl refuses the command line without the flag."""
    return any("must have a value other than None" in v.message for v in flag.validators)


def choices_of(flag: flags.Flag) -> tuple[str, ...]:
    """Return the values that a flag may have, () if any of its type."""
    return tuple(getattr(flag.parser, "enum_values", ()))


def _text(flag: flags.Flag) -> str:
    """Return what a page says about a flag: its meaning and its default."""
    text = " ".join(flag.help.split()).replace(f"; {REPEATED}", "")
    if is_required(flag):
        return f"{text} (required)"
    if flag.default is False or flag.default in (None, "", []):
        return text
    default = ",".join(flag.default) if isinstance(flag.default, list) else flag.default
    return f"{text} [{default}]"


def _row(name: str, text: str) -> str:
    """Return the lines of a flag; below a long name its text begins in a line of its own."""
    if len(name) >= INDENT - 1:
        return f"  {name}\n{_row('', text)}"
    return textwrap.fill(
        text,
        WIDTH,
        initial_indent=f"  {name:{INDENT - 2}} ",
        subsequent_indent=" " * (INDENT + 1),
        break_long_words=False,
        break_on_hyphens=False,
    )

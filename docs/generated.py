"""Pages of the site that are made from the code when it is built: the commands from their --helpfull, and the notebook.

They are not kept in the repository, so they cannot differ from the code.
"""

import concurrent.futures
import json
import pathlib
import re
import subprocess
import sys

from wan_jax.command_line import flag_source
from wan_jax.command_line.scripts import COMMANDS

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOK = "examples/first_steps.ipynb"
HEAD_OF_COMMANDS = """# Commands

Made from `--helpfull` of each command. [Command line](command_line.md) explains flags, settings and completion.
"""
FLAGS = "Flags, with their [defaults]:\n"


def write(docs: pathlib.Path) -> None:
    """Write the pages below `docs`, the folder of the pages."""
    pages = {"reference/commands.md": commands(), "tutorial/first_steps.md": notebook()}
    for name, text in pages.items():
        path = docs / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def commands() -> str:
    """Return the page of all commands."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        helps = pool.map(_help, COMMANDS.values())
    sections = [
        f"## {script}\n\n`python -m {module}`\n\n{command(text)}"
        for (script, module), text in zip(COMMANDS.items(), helps)
    ]
    return "\n".join([HEAD_OF_COMMANDS, *sections])


def command(text: str) -> str:
    """Return the Markdown of a command's help: its description, and its flags as a table."""
    if FLAGS not in text:  # a command without flags of its own
        return f"```text\n{text.strip()}\n```\n"
    description, _, rest = text.partition(FLAGS)
    rows: list[list[str]] = []
    for line in rest.partition("\n\n")[0].splitlines():
        if match := re.match(r"  (--.+?)(?:\s{2,}|\s(?=[a-z<])|$)(.*)", line):
            rows.append([match[1], match[2]])
        elif line.strip():
            rows[-1][1] += f" {line.strip()}"
    table = [f"| `{flag}` | {_cell(meaning)} |" for flag, meaning in rows]
    return "\n".join(
        [_escaped(description), "{.flags}", "| flag | meaning [default] |", "|---|---|", *table, ""]
    )


def _help(module: str) -> str:
    """Return the whole help of a command. Raises CalledProcessError where the command fails."""
    source = flag_source.read(module)
    option = "--helpfull" if source and source.names else "--help"
    return subprocess.run(
        [sys.executable, "-m", module, option],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout


def _cell(text: str) -> str:
    return re.sub(r"([|<*_\[\]])", r"\\\1", text.strip())


def _escaped(text: str) -> str:
    """Return prose of a docstring for Markdown; its indented examples are code there, too."""
    lines = (
        x if x.startswith("    ") else re.sub(r"([<*_])", r"\\\1", x) for x in text.split("\n")
    )
    return re.sub(r"`[^`\n]+`", lambda m: m[0].replace("\\", ""), "\n".join(lines))


def notebook() -> str:
    """Return the notebook as a page, with links that start at the page's folder."""
    cells = json.loads((ROOT / NOTEBOOK).read_text(encoding="utf-8"))["cells"]
    parts = []
    for cell in cells:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
    text = "\n\n".join(parts).replace("](../docs/", "](../")
    head, _, rest = text.partition("\n\n")
    text = re.sub(
        r"\[docs/[\w/]+/(\w+)\.md\]",
        lambda m: f"[{m[1].capitalize()}]",
        f"{head}\n\nThis page is {{download}}`a notebook <../../{NOTEBOOK}>`.\n\n{rest}",
    )
    return text + "\n"

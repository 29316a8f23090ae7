"""What a command answers before its module is imported, which takes seconds for JAX: --help,
--settings, --completion, and a recipe that does not exist.
"""

import importlib
import os
import re
import runpy
import sys
from collections.abc import Iterator, Sequence

from wan_jax.command_line import completion, flag_source, help_page, recipe_files
from wan_jax.command_line.scripts import COMMANDS
from wan_jax.errors import UserError

HELP = re.compile(r"--?(h|\?|help|helpshort|helpfull|helpxml)(=.*)?")
FULL = ("--helpfull", "--helpxml")
# By name, because this package imports none of the others: the command that prints the reference
# of the settings, and their declarations.
SETTINGS = "grpo.settings"
SCHEMA = "grpo.settings.schema"


def answer(module: str, arguments: Sequence[str]) -> None:
    """Answer a request that needs no more than the flags of a command, and exit; otherwise return.

    module: of the command, e.g. 'grpo.train'. arguments: its command line without the program.
    """
    module = module.removesuffix(".__main__")
    asked = dict(_requests(arguments))
    recipes = any(a.startswith("--config") or a.endswith(".py") for a in arguments)
    if not (asked or recipes):
        return
    source = flag_source.read(module)
    if source is None or not source.names:  # not a command with absl's flags
        return
    try:
        if "help" in asked:
            _print(help_page.page(source, source.define(), full=asked["help"] in FULL))
        elif "settings" in asked and "config" in source.names:
            sys.argv = [sys.argv[0], "--plain", *filter(None, [asked["settings"]])]
            runpy.run_module(SETTINGS, run_name="__main__", alter_sys=True)
        elif "completion" in asked:
            _print(_completion(asked["completion"], module, source))
        else:
            if "config" in source.names:
                recipe_files.check(arguments)
            return
    except UserError as error:
        sys.exit(f"error: {error}")
    sys.exit(0)


def _completion(shell: str, module: str, source: flag_source.Source) -> str:
    """Return the script that completes the console script of a command. Raises `UserError`."""
    scripts = {module: script for script, module in COMMANDS.items()}
    settings = {}
    if "config" in source.names:
        for key, entry in importlib.import_module(SCHEMA).SETTINGS.items():
            settings[key] = ("True", "False") if entry.kind is bool else entry.choices
    return completion.script(shell, scripts.get(module, module), source.define(), settings)


def _print(text: str) -> None:
    """Print the text, as much as is read of it (`--help | head`)."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _requests(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield (name, value) of the arguments that are answered early; of help the argument itself."""
    for i, argument in enumerate(arguments):
        if argument == "--":
            return
        if HELP.fullmatch(argument):
            yield "help", argument
        name, equals, value = argument.partition("=")
        if name in ("--settings", "--completion"):
            following = arguments[i + 1] if i + 1 < len(arguments) else "-"
            yield name[2:], value if equals or following.startswith("-") else following

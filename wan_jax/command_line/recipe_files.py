"""The recipe of a command line: found by path or by name, and what is wrong if there is none."""

import difflib
import os
import pathlib
import re
from collections.abc import Sequence

from wan_jax.command_line import installed
from wan_jax.errors import UserError

FOLDERS = (pathlib.Path("configs"), pathlib.Path("configs/published"))


def check(arguments: Sequence[str]) -> None:
    """Raise `UserError` where no recipe is found, or it is not given as a flag."""
    with_recipe(arguments)
    if not any(a.startswith("--config") for a in arguments):
        for i, argument in enumerate(arguments):
            after_flag = i and arguments[i - 1].startswith("-") and "=" not in arguments[i - 1]
            if argument.endswith(".py") and not argument.startswith("-") and not after_flag:
                raise UserError(stray_argument(argument))


def stray_argument(argument: str) -> str:
    """Return what is wrong with an argument that is not a flag."""
    if argument.endswith(".py"):
        return f"{argument} is not given as a flag; recipes are given as --config={argument}"
    if re.match(r"[a-z_]+\.[a-z_.]+=", argument):
        return f"{argument} is not given as a flag; settings are given as --config.{argument}"
    return f"unexpected argument {argument!r}; settings are given as --name=value, see --help"


def with_recipe(argv: Sequence[str]) -> list[str]:
    """Return argv with the path of the recipe in --config=RECIPE. Raises `UserError` if there is
    none.
    """
    expanded = list(argv)
    for i, argument in enumerate(argv):
        if argument == "--config" and i + 1 < len(argv):
            expanded[i + 1] = recipe_path(argv[i + 1])
        elif argument.startswith("--config="):
            expanded[i] = f"--config={recipe_path(argument.removeprefix('--config='))}"
    return expanded


def recipe_path(recipe: str) -> str:
    """Return the path of a recipe: a file, `~` expanded, or the name of one in `configs`, of the
    current folder or installed. Raises `UserError` with the most similar name if there is none.
    """
    name, colon, argument = os.path.expanduser(recipe).partition(":")  # of get_config
    file = pathlib.Path(name)
    named = f"{name.removesuffix('.py')}.py"
    for candidate in (file, *(folder / named for folder in FOLDERS)):
        if (found := installed.data_file(candidate)).is_file():
            return f"{found}{colon}{argument}"
    similar = [
        path
        for folder in (file.parent, *FOLDERS, *(installed.ROOT / folder for folder in FOLDERS))
        for path in sorted(folder.glob("*.py"))
        if path.stem not in ("__init__", "defaults", "common")
        and difflib.get_close_matches(file.stem, [path.stem])
    ]
    similar.sort(
        key=lambda path: difflib.SequenceMatcher(None, file.stem, path.stem).ratio(), reverse=True
    )
    hint = (
        f"did you mean {_short(similar[0])}?"
        if similar
        else "give a Python file with get_config(), e.g. configs/tiny_ocr.py"
    )
    raise UserError(
        f"recipe --config={recipe} {'is a folder' if file.is_dir() else 'does not exist'}; {hint}"
    )


def _short(path: pathlib.Path) -> pathlib.Path:
    """Return an installed recipe's path as a command line may have it."""
    return path.relative_to(installed.ROOT) if path.is_relative_to(installed.ROOT) else path

"""Parsing of a command line: recipes and flags, with every mistake reported in one line."""

import difflib
import os
import pathlib
import re
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from absl import flags

from wan_jax.errors import UserError

# Errors of flags, and of recipes, which are Python.
FLAG_ERRORS = (
    flags.Error,
    ArithmeticError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    OSError,
    SyntaxError,
    TypeError,
    ValueError,
)
HELP = re.compile(r"--?(help\w*|\?)(=.*)?")
MISSING = re.compile(r"flag --(\w+)=None: Flag --\1 must have a value other than None\.")
IN_RECIPE = re.compile(r'File "([^"]+)", line (\d+)')


def parse_flags(argv):
    """Parse the command line as absl does. Mistakes in flags and recipes are printed in one line
    with exit code 1; --help exits with 0.
    """
    try:
        argv = with_recipe(last_of_each(argv))
        return flags.FLAGS(argv)
    except (UserError, *FLAG_ERRORS) as error:
        positional = next(
            (a for a in argv[1:] if a.endswith(".py") and not a.startswith("-")), None
        )
        if (
            isinstance(error, flags.Error)
            and positional
            and not any(a.startswith("--config") for a in argv)
        ):
            fail(stray_argument(positional))
        fail(flag_message(error))
    except SystemExit:
        if any(HELP.fullmatch(a) for a in argv[1:]):
            sys.exit(0)  # absl has printed the help, and exits with 1
        raise


def stray_argument(argument: str) -> str:
    """Return what is wrong with an argument that is not a flag."""
    if argument.endswith(".py"):
        return f"{argument} is not given as a flag; recipes are given as --config={argument}"
    return f"unexpected argument {argument!r}; settings are given as --name=value, see --help"


def with_recipe(argv: Sequence[str]) -> list[str]:
    """Return argv with `~` expanded in --config=RECIPE. Raise `UserError` when that recipe does not
    exist.
    """
    expanded = list(argv)
    for i, argument in enumerate(argv):
        if argument == "--config" and i + 1 < len(argv):
            expanded[i + 1] = recipe_path(argv[i + 1])
        elif argument.startswith("--config="):
            expanded[i] = f"--config={recipe_path(argument.removeprefix('--config='))}"
    return expanded


def recipe_path(recipe: str) -> str:
    """Return the path of the recipe with `~` expanded. Raise `UserError` with the most similar name
    when it does not exist.
    """
    recipe = os.path.expanduser(recipe)
    file = pathlib.Path(recipe.partition(":")[0])  # after the colon: the argument of get_config
    if file.is_file():
        return recipe
    similar = [
        path
        for folder in (file.parent, pathlib.Path("configs"), pathlib.Path("configs/published"))
        for path in sorted(folder.glob("*.py"))
        if path.stem not in ("__init__", "defaults", "common")
        and difflib.get_close_matches(file.stem, [path.stem])
    ]
    similar.sort(
        key=lambda path: difflib.SequenceMatcher(None, file.stem, path.stem).ratio(), reverse=True
    )
    hint = (
        f"did you mean {similar[0]}?"
        if similar
        else "give a Python file with get_config(), e.g. configs/tiny_ocr.py"
    )
    raise UserError(
        f"recipe --config={recipe} {'is a folder' if file.is_dir() else 'does not exist'}; {hint}"
    )


def last_of_each(argv: Sequence[str]) -> list[str]:
    """Return argv with only the last of several --config.KEY of one key, because ml_collections
    concatenates tuples that are given twice.
    """
    last = list(argv[:1])
    for i, argument in enumerate(argv[1:], 1):
        key, equals, _ = argument.partition("=")
        repeated = (
            key.startswith("--config.")
            and equals
            and any(a.startswith(f"{key}=") for a in argv[i + 1 :])
        )
        if not repeated:
            last.append(argument)
    return last


def flag_message(error: Exception) -> str:
    """Return the text, in one line, for one of `FLAG_ERRORS` or a `UserError`."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, flags.Error):
        if missing := MISSING.fullmatch(str(error)):
            return f"--{missing[1]} is missing; see --help"
        # an error in a recipe: ml_collections puts its traceback into the message
        if "Traceback (most recent call last)" in str(error):
            places = [
                place for place in IN_RECIPE.findall(str(error)) if "site-packages" not in place[0]
            ]
            last = str(error).strip().splitlines()[-1].partition(": ")[2]
            return f"settings: {last}" + (f" ({':'.join(places[-1])})" if places else "")
        return f"{error}; see --help"
    # An error in a recipe or in a check: name the innermost line that is not a library's.
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "site-packages" not in frame.filename
        and frame.filename != __file__
        and not frame.filename.startswith("<frozen")
    ]
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    while error.args and isinstance(error.args[0], Exception):
        error = error.args[0]
    message = error.args[0] if isinstance(error, KeyError) and error.args else error
    return f"settings: {' '.join(str(message).split())}{where}"


def fail(message: str) -> NoReturn:
    """Print the message and exit with code 1."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(1)

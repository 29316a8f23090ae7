"""Parsing of a command line: recipes and flags, with every mistake reported in one line."""

import itertools
import re
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from absl import flags

from wan_jax.command_line import early, installed
from wan_jax.command_line.recipe_files import stray_argument, with_recipe
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
# what Python and absl say of values that they cannot parse, as {pattern: what was expected}
NOT_PARSED = {
    r"\('Non-boolean argument to boolean flag', .*\)": "True or False",
    r"invalid literal for int\(\) with base 10: .*": "a whole number",
    r"could not convert string to float: .*": "a number",
}
IN_RECIPE = re.compile(r'File "([^"]+)", line (\d+)')


def parse_flags(argv):
    """Parse the command line as absl does. Mistakes in flags and recipes are printed in one line
    with exit code 1; --help exits with 0.
    """
    main = sys.modules["__main__"].__spec__
    if main:
        early.answer(main.name, argv[1:])
    try:
        argv = with_recipe(last_of_each(argv))
        installed.import_configs()
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
        missing = MISSING.fullmatch(str(error))
        if missing and (stray := _first_stray(argv)):
            fail(f"{stray!r} is not given as a flag; is it --{missing[1]}={stray}? See --help")
        fail(flag_message(error))
    except SystemExit:
        if any(HELP.fullmatch(a) for a in argv[1:]):
            sys.exit(0)  # absl has printed the help, and exits with 1
        raise


def _first_stray(argv: Sequence[str]) -> str | None:
    """Return the first argument that is no flag and cannot be the value of one, None without any."""
    for before, argument in itertools.pairwise(argv):
        if not argument.startswith("-") and ("=" in before or not before.startswith("-")):
            return argument
    return None


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
        unknown = getattr(error, "flagname", "")
        if "." in unknown and not unknown.startswith("config."):
            return f"--{unknown} is no flag; settings are given as --config.{unknown}=VALUE"
        # an error in a recipe: ml_collections puts its traceback into the message
        if "Traceback (most recent call last)" in str(error):
            places = [
                place for place in IN_RECIPE.findall(str(error)) if "site-packages" not in place[0]
            ]
            last = str(error).strip().splitlines()[-1].partition(": ")[2]
            return f"settings: {last}" + (f" ({':'.join(places[-1])})" if places else "")
        text = str(error)
        for pattern, expected in NOT_PARSED.items():
            text = re.sub(pattern, f"expected {expected}", text)
        return f"{text}; see --help"
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

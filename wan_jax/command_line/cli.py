"""What the command-line programs share: user errors are one message and exit code 1, never a
traceback.
"""

import atexit
import contextlib
import difflib
import errno
import gc
import logging
import os
import pathlib
import re
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence

import jax
from absl import app, flags
from absl import logging as absl_logging

from wan_jax.distributed import memory
from wan_jax.errors import UserError


class AskedToEnd(Exception):
    """The program ends because of SIGTERM; the message says what is saved."""


ADVICE = {
    errno.ENOSPC: "the disk is full; free some space and run the same command again",
    errno.EDQUOT: "the disk quota is used up; free some space and run the same command again",
    errno.EFBIG: "files may not become so large here; choose another disk, or raise `ulimit -f`",
    errno.ENOTDIR: "a file stands where a folder is needed; choose another folder",
    errno.EISDIR: "a folder stands where a file is needed; remove it, or choose another folder",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.EACCES: "permission denied; choose a folder you may write to",
    errno.EPERM: "permission denied; choose a folder you may write to",
}
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
)  # of flags and of recipes, which are Python
HELP = re.compile(r"--?(help\w*|\?)(=.*)?")
MISSING = re.compile(r"flag --(\w+)=None: Flag --\1 must have a value other than None\.")
IN_RECIPE = re.compile(r'File "([^"]+)", line (\d+)')
interrupted = threading.Event()  # Ctrl-C was pressed
asked_to_end = threading.Event()  # SIGTERM came, and the program is on its way to a good end
INTERRUPTED, TERMINATED = 130, 143  # the exit codes after them
OS_ERROR = re.compile(r"os[_ ]error(?:_code)?[= ]'?(\d+)")
LOCAL_FILE = re.compile(r'local file "([^"]+)"')  # in tensorstore's errors
# What orbax and tensorstore print about an error in one of their threads, which they also raise
# where it was caused.
ECHO = re.compile(
    r"_SignalingThread\.run\(\) raised|exception was never retrieved|Event loop is closed"
)


def run(main: Callable) -> None:
    """`absl.app.run(main)`, with user errors, full or read-only disks and Ctrl-C reported in one
    line.

    Exit codes: 1 for errors, 130 for Ctrl-C, 143 where `AskedToEnd` is raised.
    """

    def guarded(argv):
        if len(argv) > 1:
            fail(stray(argv[1]))
        if not flags.FLAGS["verbosity"].present:
            # orbax and JAX say a lot at the usual level
            absl_logging.set_verbosity(absl_logging.ERROR)
            # but a dead reward server must be seen
            logging.getLogger("rewards").setLevel(logging.WARNING)
            drop_echoes()
        try:
            main(argv)
        except BaseException as error:
            if (known := explain(error)) is None:
                raise
            print(known[0], file=sys.stderr)
            sys.exit(known[1])

    memory.allow_pinned()
    interrupted.clear()
    atexit.register(leave)  # the last to run of what is registered from here on
    signal.signal(signal.SIGINT, interrupt)
    app.run(guarded, flags_parser=parse_flags)


def drop_echoes() -> None:
    """Keep orbax's threads from printing the traceback of an error that the caller gets too, and
    explains.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(is_no_echo)
    sys.unraisablehook = report_unraisable


def is_no_echo(record: logging.LogRecord) -> bool:
    return not ECHO.search(str(record.msg))


def report_unraisable(unraisable) -> None:
    """Print an error that could not be raised, unless it is an echo."""
    if not ECHO.search(str(unraisable.exc_value)):
        sys.__unraisablehook__(unraisable)


def stop_if_interrupted() -> None:
    """Raises the KeyboardInterrupt again that a callback of some library has lost."""
    if interrupted.is_set():
        raise KeyboardInterrupt


def end_well_on_sigterm() -> None:
    """From now on SIGTERM sets `asked_to_end`, and a second one ends the process at once.

    A thread reads the signals, since Python's own handlers wait for the main thread, which may hang
    inside a library.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def await_sigterm():
        while os.read(reading, 1)[0] != signal.SIGTERM:
            pass

    def listen():
        await_sigterm()
        asked_to_end.set()
        os.write(
            2,
            b"\nSIGTERM: the run ends once its epoch is finished and saved; a second one ends it at once\n",
        )
        await_sigterm()
        os._exit(TERMINATED)

    asked_to_end.clear()
    threading.Thread(target=listen, name="signals", daemon=True).start()
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, lambda signum, frame: asked_to_end.set())


def leave() -> None:
    """Ends a process that Ctrl-C stopped, with exit code 130. Otherwise Python may kill itself by
    SIGINT in place of it, or die while it tears down what was interrupted inside XLA. Others leave
    without a last search for cycles among all that JAX has traced, a second's work.
    """
    if interrupted.is_set():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(INTERRUPTED)
    gc.freeze()


def keep_compiled_programs() -> None:
    """Lets JAX keep the programs it compiles for an accelerator, so that the next run starts at
    once.

    In JAX_COMPILATION_CACHE_DIR if that is set, or ~/.cache/wan_jax. Not for the CPU, whose
    programs compile fast and only fit the machine they were compiled on.
    """
    if jax.default_backend() != "cpu" and not jax.config.jax_compilation_cache_dir:
        jax.config.update(
            "jax_compilation_cache_dir", str(pathlib.Path.home() / ".cache" / "wan_jax")
        )


def explain(error: BaseException) -> tuple[str, int] | None:
    """What to print for an error, and the exit code; None where only a traceback helps."""
    # the error is its KeyboardInterrupt, or what an extension module made of it
    if interrupted.is_set():
        return (
            "\nstopped; everything saved so far is whole, the same command continues from it",
            INTERRUPTED,
        )
    if isinstance(error, UserError):
        return f"error: {error}", 1
    if isinstance(error, AskedToEnd):
        return str(error), TERMINATED
    if (cause := disk_error(error)) is not None:  # an OSError may come wrapped, by orbax for one
        path = cause.filename2 or cause.filename
        where = f"{path}: " if path else ""
        return f"error: {where}{ADVICE[cause.errno]} ({cause.strerror})", 1
    return None


def interrupt(signum, frame):
    """Raises KeyboardInterrupt, a little later where Python would print and forget it: in JAX's
    callback of the garbage collector and in destructors.
    """
    if frame is not None and frame.f_code.co_name in ("_xla_gc_callback", "__del__"):
        threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGINT)).start()
    else:
        interrupted.set()
        raise KeyboardInterrupt


def parse_flags(argv):
    """Parse as absl does, with errors of flags and recipes in one line; --help exits with 0."""
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
            fail(stray(positional))
        fail(flag_message(error))
    except SystemExit:
        if any(HELP.fullmatch(a) for a in argv[1:]):
            sys.exit(0)  # absl has printed the help, and would exit with 1
        raise


def stray(argument: str) -> str:
    """Say what is wrong with an argument that is no flag."""
    if argument.endswith(".py"):
        return f"{argument} is not given as a flag; recipes are given as --config={argument}"
    return f"unexpected argument {argument!r}; settings are given as --name=value, see --help"


def with_recipe(argv: Sequence[str]) -> list[str]:
    """Return argv with `~` expanded in --config=RECIPE. Raise `UserError` when there is no such
    recipe.
    """
    found = list(argv)
    for i, argument in enumerate(argv):
        if argument == "--config" and i + 1 < len(argv):
            found[i + 1] = recipe_path(argv[i + 1])
        elif argument.startswith("--config="):
            found[i] = f"--config={recipe_path(argument.removeprefix('--config='))}"
    return found


def recipe_path(recipe: str) -> str:
    """Return the recipe's path with `~` expanded. Raise `UserError` with the nearest name when it
    does not exist.
    """
    recipe = os.path.expanduser(recipe)
    file = pathlib.Path(recipe.partition(":")[0])  # what follows is an argument of its get_config
    if file.is_file():
        return recipe
    near = [
        path
        for folder in (file.parent, pathlib.Path("configs"))
        for path in sorted(folder.glob("*.py"))
        if path.stem not in ("__init__", "defaults")
        and difflib.get_close_matches(file.stem, [path.stem])
    ]
    near.sort(
        key=lambda path: difflib.SequenceMatcher(None, file.stem, path.stem).ratio(), reverse=True
    )
    hint = (
        f"did you mean {near[0]}?"
        if near
        else "give a Python file with get_config(), e.g. configs/tiny_ocr.py"
    )
    raise UserError(
        f"recipe --config={recipe} {'is a folder' if file.is_dir() else 'does not exist'}; {hint}"
    )


def last_of_each(argv: Sequence[str]) -> list[str]:
    """argv with the last of several --config.KEY of one key; ml_collections joins tuples that are
    given twice.
    """
    kept = list(argv[:1])
    for i, argument in enumerate(argv[1:], 1):
        key, equals, _ = argument.partition("=")
        again = (
            key.startswith("--config.")
            and equals
            and any(a.startswith(f"{key}=") for a in argv[i + 1 :])
        )
        if not again:
            kept.append(argument)
    return kept


def flag_message(error: Exception) -> str:
    """In one line, one of `FLAG_ERRORS` or a `UserError`."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, flags.Error):
        if missing := MISSING.fullmatch(str(error)):
            return f"--{missing[1]} is missing; see --help"
        # of a recipe, which ml_collections puts in the message
        if "Traceback (most recent call last)" in str(error):
            places = [
                place for place in IN_RECIPE.findall(str(error)) if "site-packages" not in place[0]
            ]
            last = str(error).strip().splitlines()[-1].partition(": ")[2]
            return f"settings: {last}" + (f" ({':'.join(places[-1])})" if places else "")
        return f"{error}; see --help"
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


@contextlib.contextmanager
def user_input():
    """Around the code that checks settings and opens what they name: its ValueErrors are the user's
    to mend.
    """
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from None


def disk_error(error: BaseException | None) -> OSError | None:
    """The first error of the disk that `ADVICE` knows in the chain of causes.

    tensorstore (under orbax) and safetensors raise errors of their own that only name the system's
    error number.
    """
    while error is not None:
        if (
            isinstance(error, FileExistsError)
            and error.filename
            and not os.path.isdir(error.filename)
        ):
            # of a mkdir
            return NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), error.filename)
        if isinstance(error, OSError) and error.errno in ADVICE:
            return error
        if (named := OS_ERROR.search(str(error))) and int(named[1]) in ADVICE:
            path = LOCAL_FILE.search(str(error))
            return OSError(int(named[1]), os.strerror(int(named[1])), path and path[1])
        error = error.__cause__ or error.__context__
    return None


def read_text(path, what: str, advice: str) -> str:
    """Return the text of a file that a user wrote: UTF-8, with or without a byte order mark.

    Raises `UserError` when there is no such file, or it is something else. what, advice: for its
    message.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(
            f"{what} {path} {'is a folder' if path.is_dir() else 'does not exist'}; {advice}"
        )
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{what} {path} is not UTF-8 text ({error.reason} at byte {error.start}); save it as "
            "UTF-8"
        ) from None


def check_space(folder, needed: int, what: str) -> None:
    """Raises `UserError` when the disk of `folder`, which need not exist yet, has less than
    `needed` bytes free.
    """
    there = next(
        p
        for p in (pathlib.Path(folder).absolute(), *pathlib.Path(folder).absolute().parents)
        if p.exists()
    )
    free = shutil.disk_usage(there).free
    if free < needed:
        raise UserError(
            f"{folder}: {what} needs {needed / 1e6:,.1f} MB, the disk has {free / 1e6:,.1f} MB "
            "left; free some space and run the same command again"
        )


def fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(1)

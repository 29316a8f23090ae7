"""The start and the end of every command: errors a user can fix, a full disk, Ctrl-C and SIGTERM
are reported in one line, without a traceback.
"""

import atexit
import contextlib
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
from collections.abc import Callable

import jax
from absl import app, flags
from absl import logging as absl_logging

from wan_jax.command_line import installed
from wan_jax.command_line.parsing import fail, parse_flags
from wan_jax.command_line.recipe_files import stray_argument
from wan_jax.distributed import memory
from wan_jax.errors import UserError


class AskedToEnd(Exception):
    """The program ends because of Ctrl-C or SIGTERM; the message states what is saved."""


ADVICE = {
    errno.ENOSPC: "the disk is full; free some space and run the same command again",
    errno.EDQUOT: "the disk quota is used up; free some space and run the same command again",
    errno.EFBIG: "the file is larger than allowed; choose another disk, or raise `ulimit -f`",
    errno.ENOTDIR: "there is a file where a folder is needed; choose another folder",
    errno.EISDIR: "there is a folder where a file is needed; remove it, or choose another folder",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.EACCES: "permission denied; choose a folder you may write to",
    errno.EPERM: "permission denied; choose a folder you may write to",
}
interrupted = threading.Event()  # Ctrl-C was pressed
asked_to_end = threading.Event()  # by a signal, and the program is finishing its work
received: list[int] = []  # the signals that asked it to
INTERRUPTED = 130  # exit code after Ctrl-C
TERMINATED = 143  # exit code after SIGTERM
STOPPED = "stopped; everything saved so far is whole, the same command continues from it"
OS_ERROR = re.compile(r"os[_ ]error(?:_code)?[= ]'?(\d+)")
LOCAL_FILE = re.compile(r'local file "([^"]+)"')  # in tensorstore's errors
# What orbax and tensorstore print about an error in one of their threads. They also raise it in the
# caller.
ECHO = re.compile(
    r"_SignalingThread\.run\(\) raised|exception was never retrieved|Event loop is closed"
)


def run(main: Callable) -> None:
    """Run `absl.app.run(main)`. User errors, full or read-only disks and Ctrl-C are reported in one
    line.

    Exit codes: 1 for errors, 130 for Ctrl-C, 143 for SIGTERM.
    """

    def guarded(argv):
        if len(argv) > 1:
            fail(stray_argument(argv[1]))
        if not flags.FLAGS["verbosity"].present:
            # orbax and JAX log a lot at the default level
            absl_logging.set_verbosity(absl_logging.ERROR)
            # but a dead reward server must be reported
            logging.getLogger("rewards").setLevel(logging.WARNING)
            drop_echoes()
        try:
            main(argv)
        # Broad, because Ctrl-C may arrive as any error; what `explain` does not know is raised.
        except BaseException as error:
            if (known := explain(error)) is None:
                raise
            message, code = known
            print(message, file=sys.stderr)
            sys.exit(code)

    memory.allow_pinned()
    interrupted.clear()
    atexit.register(leave)  # runs after everything that is registered later
    signal.signal(signal.SIGINT, interrupt)
    app.run(guarded, flags_parser=parse_flags)


def drop_echoes() -> None:
    """Prevent orbax's threads from printing the traceback of an error that is also raised in the
    caller, and explained there.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(is_no_echo)
    sys.unraisablehook = report_unraisable


def is_no_echo(record: logging.LogRecord) -> bool:
    """Return whether a log record is something else than an echo."""
    return not ECHO.search(str(record.msg))


def report_unraisable(unraisable) -> None:
    """Print an error that could not be raised, unless it is an echo."""
    if not ECHO.search(str(unraisable.exc_value)):
        sys.__unraisablehook__(unraisable)


def stop_if_interrupted() -> None:
    """Raise KeyboardInterrupt if Ctrl-C was pressed and the callback of a library has lost the
    exception.
    """
    if interrupted.is_set():
        raise KeyboardInterrupt


def end_well_on_signals() -> None:
    """From now on Ctrl-C and SIGTERM set `asked_to_end`, and a second one ends the process at once.

    A thread reads the signals, because Python's handlers wait for the main thread, which may hang
    inside a library. Ctrl-C is left alone where `run` does not handle it.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    names = {signal.SIGTERM: "SIGTERM"}
    if signal.getsignal(signal.SIGINT) is interrupt:
        names[signal.SIGINT] = "Ctrl-C"

    def await_signal() -> signal.Signals:
        while (number := os.read(reading, 1)[0]) not in names:
            pass
        return signal.Signals(number)

    def listen():
        first = await_signal()
        received.append(first)
        asked_to_end.set()
        message = (
            f"\n{names[first]}: the run ends once its epoch is finished and saved; "
            "a second one ends it at once\n"
        )
        os.write(2, message.encode())
        if await_signal() == signal.SIGINT:
            os.write(2, f"\n{STOPPED}\n".encode())
            os._exit(INTERRUPTED)
        os._exit(TERMINATED)

    received.clear()
    asked_to_end.clear()
    threading.Thread(target=listen, name="signals", daemon=True).start()
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for number in names:
        signal.signal(number, lambda signum, frame: None)


def asked_by() -> str:
    """Return the name of the signal that asked this process, or another one of its run, to end."""
    return "Ctrl-C" if received[:1] == [signal.SIGINT] else "SIGTERM"


def leave() -> None:
    """Exit with code 130 after Ctrl-C. Otherwise Python may kill itself by SIGINT instead, or crash
    while it tears down what was interrupted inside XLA.

    Other processes exit without a final garbage collection of all that JAX has traced, which takes
    a second.
    """
    if interrupted.is_set():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(INTERRUPTED)
    gc.freeze()


def enable_compilation_cache() -> None:
    """Let JAX store the functions it compiles for an accelerator, so that the next run starts at
    once.

    The folder is JAX_COMPILATION_CACHE_DIR if that is set, else ~/.cache/wan_jax. Not on the CPU,
    where compilation is fast and its result only fits the machine that compiled it.
    """
    folder = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    if jax.default_backend() != "cpu" and not folder:
        jax.config.update(
            "jax_compilation_cache_dir", str(pathlib.Path.home() / ".cache" / "wan_jax")
        )


def explain(error: BaseException) -> tuple[str, int] | None:
    """Return the message for an error and the exit code; None if only a traceback helps."""
    # the error is the KeyboardInterrupt, or what an extension module raised because of it
    if interrupted.is_set():
        return f"\n{STOPPED}", INTERRUPTED
    if isinstance(error, UserError):
        return f"error: {error}", 1
    if isinstance(error, AskedToEnd):
        return str(error), INTERRUPTED if asked_by() == "Ctrl-C" else TERMINATED
    if (cause := disk_error(error)) is not None:  # it may be wrapped, for example by orbax
        assert cause.errno is not None  # it is in ADVICE
        path = cause.filename2 or cause.filename
        where = f"{path}: " if path else ""
        return f"error: {where}{ADVICE[cause.errno]} ({cause.strerror})", 1
    return None


def interrupt(signum, frame):
    """Handle SIGINT by raising KeyboardInterrupt. In JAX's callback of the garbage collector and in
    destructors, where Python would print and drop it, the signal is sent again a little later.
    """
    if frame is not None and frame.f_code.co_name in ("_xla_gc_callback", "__del__"):
        threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGINT)).start()
    else:
        interrupted.set()
        raise KeyboardInterrupt


@contextlib.contextmanager
def user_input():
    """Convert ValueErrors to `UserError` while settings are checked and their files opened."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from None


def disk_error(error: BaseException | None) -> OSError | None:
    """Return the first error of the disk that `ADVICE` knows in the chain of causes, or None.

    tensorstore (under orbax) and safetensors raise errors of their own that only contain the
    system's error number.
    """
    while error is not None:
        if (
            isinstance(error, FileExistsError)
            and error.filename
            and not os.path.isdir(error.filename)
        ):
            # mkdir, where a file has that name
            return NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), error.filename)
        if isinstance(error, OSError) and error.errno in ADVICE:
            return error
        if (named := OS_ERROR.search(str(error))) and int(named[1]) in ADVICE:
            path = LOCAL_FILE.search(str(error))
            return OSError(int(named[1]), os.strerror(int(named[1])), path and path[1])
        error = error.__cause__ or error.__context__
    return None


def read_text(path, what: str, advice: str) -> str:
    """Return the text of a file that a user wrote: UTF-8, with or without a byte order mark. Where
    there is none, a file of that name that is installed (`installed.data_file`) is read.

    what, advice: for the message. Raises `UserError` when the file does not exist or is something
    else.
    """
    path = installed.data_file(path)
    if path.is_dir():
        raise UserError(f"{what} {path} is a folder; {advice}")
    if not path.is_file():
        place = "" if path.is_absolute() else f" in {pathlib.Path.cwd()}, where the command runs"
        raise UserError(f"{what} {path} does not exist{place}; {advice}")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{what} {path} is not UTF-8 text ({error.reason} at byte {error.start}); save it as "
            "UTF-8"
        ) from None


def check_space(folder, needed: int, what: str) -> None:
    """Raise `UserError` when the disk of `folder`, which need not exist yet, has less than `needed`
    bytes free.
    """
    folder_path = pathlib.Path(folder).absolute()
    existing = next(path for path in (folder_path, *folder_path.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"{folder}: {what} needs {needed / 1e6:,.1f} MB, the disk has {free / 1e6:,.1f} MB "
            "left; free some space and run the same command again"
        )

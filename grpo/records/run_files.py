"""Reads and replaces a run's small files, so that a fault of the disk neither damages a good file
nor ends the program.
"""

import functools
import json
import os
import pathlib
import sys


@functools.cache
def warn(message: str) -> None:
    """Print a warning to standard error, once per process and text."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


def read_json(path: pathlib.Path) -> dict:
    """Return the JSON object in a file.

    Returns {} if there is no such file, and also, with a warning, if it cannot be read.
    """
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
        problem = "not a JSON object"
    except (ValueError, RecursionError) as error:
        problem = str(error)
    warn(f"{path} cannot be read and is left out: {problem}")
    return {}


def write_atomically(path: pathlib.Path, data: bytes) -> None:
    """Replace a file as a whole: after a kill or an OSError it has the old or the new data."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

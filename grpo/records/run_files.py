"""How a run's small files are read and replaced, so that no fault of the disk spoils a good one or
ends the program.
"""

import functools
import json
import os
import pathlib
import sys


@functools.cache
def warn(message: str) -> None:
    """Print a warning, the same one once in a process."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


def read_json(path: pathlib.Path) -> dict:
    """A JSON object; {} when there is no such file or, with a warning, none that can be read."""
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
    """The whole file or no change, whatever happens in between."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

"""Files of one JSON record a line. The JSON is strict: NaN and infinities are written as null and read
back as NaN.
"""

import contextlib
import json
import math
import os
import pathlib
from collections.abc import Callable

from grpo.records.run_files import warn


def flatten(values: dict, prefix: str = "") -> dict:
    """Join the keys of nested dicts: {'a': {'b': 1}} -> {'a/b': 1}."""
    flat = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}/") if isinstance(value, dict) else {name: value}
    return flat


def append_line(path: pathlib.Path, record: dict) -> None:
    """Append a record to a JSONL file and wait for the disk.

    Raises:
      OSError: the line could not be written whole; the file is as it was before.
    """
    data = record_line(record)
    size = path.stat().st_size if path.exists() else 0
    try:
        with open(path, "ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        with contextlib.suppress(OSError):
            os.truncate(path, size)
        raise


def record_line(record: dict) -> bytes:
    """Return the line of a record, UTF-8 with its end."""
    return (json.dumps(plain(record), ensure_ascii=False, allow_nan=False) + "\n").encode(
        errors="replace"
    )


def plain(value):
    """Convert to what JSON can hold.

    Arrays and tuples become lists, NumPy scalars numbers, floats that are not finite None, and
    objects of other types text.
    """
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, bool, int)) else str(value)


def parse_lines(path: pathlib.Path, check: Callable[[dict], object]) -> tuple[list[dict], bool]:
    """Return the usable records of a .jsonl file, and whether all its lines are usable.

    A warning names the lines that are not. A last line that is no JSON does not count: a kill cut
    it off. check: raises ValueError on a record that cannot be used.
    """
    if not path.exists():
        return [], True
    lines = [
        line for line in path.read_bytes().decode(errors="replace").split("\n") if line.strip()
    ]
    records, bad = [], []
    for i, line in enumerate(lines, 1):
        try:
            record = _nan_for_null(json.loads(line))
        except (ValueError, RecursionError) as error:
            if i < len(lines):
                bad.append(f"line {i} ({error})")
            continue
        try:
            if not isinstance(record, dict):
                raise ValueError("not a JSON object")
            check(record)
            records.append(record)
        except ValueError as error:
            bad.append(f"line {i} ({error})")
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        warn(
            f"{path}: {len(bad)} of {len(lines)} lines cannot be read and are left out: "
            f"{', '.join(bad[:3])}{more}"
        )
    return records, not bad


def _nan_for_null(value):
    if isinstance(value, dict):
        return {k: _nan_for_null(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_nan_for_null(v) for v in value]
    return math.nan if value is None else value

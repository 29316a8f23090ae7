"""Manifests: the size and the CRC-32 of every file of a folder, so that damage is found before the
files are used.

A manifest is a JSON file in the folder it describes, {"files": {path: [bytes, crc32]}, ...,
"sha256": ...}, where `sha256` is the digest of the manifest itself. It is written last, so its
presence means that the folder is complete.

CRC-32 is the fastest digest of the standard library (1 to 2 GB/s on one core), and several threads
share the files. It detects every change within 32 consecutive bits, and others with a probability
of 1 - 2^-32. It does not protect against deliberate changes.
"""

import hashlib
import json
import os
import pathlib
import zlib
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

from wan_jax.errors import UserError

BLOCK = 2**20  # bytes read at once; remains in the processor's cache while its digest is computed
WORKERS = min(8, os.cpu_count() or 1)
Files = Mapping[str, tuple[int, int]]  # {path relative to the folder: (bytes, CRC-32)}


class Damaged(UserError):
    """A file that is missing, truncated, altered or unreadable."""


def read_into(
    path: pathlib.Path, buffer: memoryview, expected: tuple[int, int] | None = None
) -> None:
    """Fill `buffer`, which has the exact size of the file, from the file.

    expected: (bytes, CRC-32); None checks the size alone. Raises `Damaged`.
    """
    crc = filled = 0
    try:
        with open(path, "rb", buffering=0) as file:
            if (size := os.fstat(file.fileno()).st_size) != len(buffer):
                raise Damaged(f"{path} has {size} bytes, it should have {len(buffer)}")
            while filled < len(buffer):
                count = file.readinto(buffer[filled : filled + BLOCK])
                if not count:
                    raise Damaged(f"{path} has {filled} bytes, it should have {len(buffer)}")
                if expected is not None:
                    crc = zlib.crc32(buffer[filled : filled + count], crc)
                filled += count
    except OSError as error:
        raise Damaged(f"{path} {_unreadable(error)}") from None
    if expected is not None and (filled, crc) != tuple(expected):
        raise Damaged(f"{path} {_differs((filled, crc), expected)}")


def measure(
    folder: pathlib.Path, exclude: Collection[str] = (), flush: bool = False
) -> dict[str, tuple[int, int]]:
    """Return the size and the CRC-32 of every file below `folder`, by relative path.

    flush: also wait until each file is on disk.
    """
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    names = [name for name in names if name not in exclude]
    with ThreadPoolExecutor(WORKERS) as pool:
        return dict(zip(names, pool.map(lambda name: _digest(folder / name, flush), names)))


def problem(folder: pathlib.Path, files: Files) -> str | None:
    """Return the first file that differs from `files` and how ('PATH is missing' and similar), or
    None.
    """
    # the largest first, so that the threads end at about the same time
    names = sorted(files, key=lambda name: files[name][0], reverse=True)
    with ThreadPoolExecutor(WORKERS) as pool:
        found = pool.map(lambda name: _compare(folder, name, files[name]), names)
        return next(filter(None, found), None)


def write_manifest(path: pathlib.Path, values: dict, files: Files) -> None:
    """Write a manifest of `values` and `files`. It appears complete and is on disk on return."""
    content = values | {"files": {name: list(entry) for name, entry in files.items()}}
    text = json.dumps(content | {"sha256": _seal(content)}, indent=1) + "\n"
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def read_manifest(path: pathlib.Path) -> dict:
    """Return the content of a manifest. Without "files" it is from a version that wrote no digests.

    Raises `Damaged` when it is missing, not JSON, or differs from what was written.
    """
    content = read_json(path)
    if "files" in content or "sha256" in content:
        sealed = {key: value for key, value in content.items() if key != "sha256"}
        if content.get("sha256") != _seal(sealed) or not isinstance(content.get("files"), dict):
            raise Damaged(f"{path} differs from what was written: its own SHA-256 does not agree")
        content = sealed | {
            "files": {name: tuple(entry) for name, entry in content["files"].items()}
        }
    return content


def read_json(path: pathlib.Path) -> dict:
    """Return the JSON object in a file. Raises `Damaged`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise Damaged(f"{path} {_unreadable(error)}") from None
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{path} is not valid JSON ({str(error)[:100]})") from None
    if not isinstance(content, dict):
        raise Damaged(f"{path} is not valid: it holds no JSON object")
    return content


def combined(entries: Iterable[tuple[str, int, int]]) -> str:
    """Return one SHA-256 of (name, bytes, CRC-32) entries, in any order."""
    return hashlib.sha256(json.dumps(sorted(map(list, entries))).encode()).hexdigest()


def _seal(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _digest(path: pathlib.Path, flush: bool = False) -> tuple[int, int]:
    buffer = memoryview(bytearray(BLOCK))
    crc = size = 0
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            crc = zlib.crc32(buffer[:count], crc)
            size += count
        if flush:
            os.fsync(file.fileno())
    return size, crc


def _compare(folder: pathlib.Path, name: str, expected: tuple[int, int]) -> str | None:
    path = folder / name
    try:
        size = path.stat().st_size
        if path.is_file() and size != expected[0]:
            return f"{name} {_differs((size, 0), expected)}"
        found = _digest(path)
    except OSError as error:
        return f"{name} {_unreadable(error)}"
    return None if found == tuple(expected) else f"{name} {_differs(found, expected)}"


def _differs(found: tuple[int, int], expected: tuple[int, int]) -> str:
    if found[0] != expected[0]:
        return f"has {found[0]} bytes, it should have {expected[0]}"
    return f"differs from what was written (CRC-32 {found[1]:08x}, it should be {expected[1]:08x})"


def _unreadable(error: OSError) -> str:
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return "is missing"
    return (
        "is a folder, not a file"
        if isinstance(error, IsADirectoryError)
        else f"cannot be read ({error.strerror})"
    )

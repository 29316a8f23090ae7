"""Journal of a conversion: the finished tensors, after which the next run continues."""

import json
import os
import pathlib
import shutil

from convert.folders import JOURNAL
from wan_jax.errors import UserError


class Journal:
    """A file of JSON lines in the partial folder: first the work, then the finished tensors.

    Arguments:
        folder: the partial folder.
        work: {'format': int, 'dtypes': {component: dtype}, 'files': {name: [bytes, ns]}}.
        restart: empty the folder and begin again.

    Raises `UserError` when the folder holds a conversion of other work and `restart` is false.
    """

    def __init__(self, folder: pathlib.Path, work: dict, restart: bool = False):
        self.path = folder / JOURNAL
        lines = [] if restart else _lines(self.path)
        self._done: dict[str, set[str]] = {}
        if lines:
            _check_same(folder, lines[0], work)
            for line in lines[1:]:
                keys = self._done.setdefault(line["component"], set())
                if line["keys"] is None:
                    keys.clear()
                else:
                    keys.update(line["keys"])
        else:
            for path in folder.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        # written again: an incomplete last line would swallow the next one
        temporary = self.path.with_suffix(".new")
        with open(temporary, "w") as file:
            file.writelines(
                json.dumps(line) + "\n"
                for line in [
                    work,
                    *({"component": c, "keys": sorted(keys)} for c, keys in self._done.items()),
                ]
            )
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(self.path)

    def done(self, component: str) -> set[str]:
        """Return the state-dict keys of a component whose tensors are on the disk."""
        return set(self._done.get(component, ()))

    def add(self, component: str, keys: list[str]) -> None:
        """Record that these tensors of a component are on the disk."""
        self._done.setdefault(component, set()).update(keys)
        self._append({"component": component, "keys": keys})

    def forget(self, component: str) -> None:
        """Record that a component starts again, since its file is missing or incomplete."""
        if self._done.pop(component, None):
            self._append({"component": component, "keys": None})

    def _append(self, line: dict) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _lines(path: pathlib.Path) -> list[dict]:
    """Return the complete lines; none when there is no journal."""
    lines = []
    for text in path.read_text().splitlines() if path.is_file() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def _check_same(folder: pathlib.Path, begun: dict, work: dict) -> None:
    """Raise `UserError` unless the journal's work `begun` is the present `work`."""
    files, now = begun.get("files", {}), work["files"]
    changed = sorted(k for k in files.keys() | now.keys() if files.get(k) != now.get(k))
    reasons = []
    if changed:
        reasons.append(
            f"the source has changed since then ({len(changed)} files, the first is {changed[0]}: "
            f"bytes and time were {files.get(changed[0])}, are {now.get(changed[0])})"
        )
    reasons += [
        f"{name} was {begun.get(name)}, is {work[name]}"
        for name in ("dtypes", "format")
        if begun.get(name) != work[name]
    ]
    if reasons:
        raise UserError(
            f"a conversion to this --dst was begun in {folder} and cannot be continued: "
            f"{'; '.join(reasons)}. Give --restart to begin again"
        )

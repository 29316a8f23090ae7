"""The journal of a conversion: which tensors are in the partial folder, so that the next run goes
on from there.
"""

import json
import os
import pathlib
import shutil

from convert.folders import LEFT_OUT
from wan_jax.errors import UserError


class Journal:
    """A file of JSON lines in the partial folder: first what is being done, then tensors that are
    on the disk.

    work: {'format': int, 'dtypes': {component: dtype}, 'files': {name: [bytes, ns]}}. Raises
    `UserError` when the folder holds a conversion of other work; `restart` empties it instead.
    """

    def __init__(self, folder: pathlib.Path, work: dict, restart: bool = False):
        self.path = folder / LEFT_OUT
        lines = [] if restart else _lines(self.path)
        self._done: dict[str, set[str]] = {}
        if lines:
            _check_same(folder, lines[0], work)
            for line in lines[1:]:
                component = self._done.setdefault(line["component"], set())
                component.clear() if line["keys"] is None else component.update(line["keys"])
        else:
            for path in folder.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        # written anew: a line that was cut short by the kill would swallow the next one
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
        """The state-dict keys of a component that are on the disk."""
        return set(self._done.get(component, ()))

    def add(self, component: str, keys: list[str]) -> None:
        self._done.setdefault(component, set()).update(keys)
        self._append({"component": component, "keys": keys})

    def forget(self, component: str) -> None:
        """The component begins anew: its file is not there or not whole."""
        if self._done.pop(component, None):
            self._append({"component": component, "keys": None})

    def _append(self, line: dict) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _lines(path: pathlib.Path) -> list[dict]:
    """The lines that are whole; none when there is no journal."""
    lines = []
    for text in path.read_text().splitlines() if path.is_file() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def _check_same(folder: pathlib.Path, begun: dict, work: dict) -> None:
    files, now = begun.get("files", {}), work["files"]
    changed = sorted(k for k in files.keys() | now.keys() if files.get(k) != now.get(k))
    reasons = []
    if changed:
        reasons.append(
            f"the source has changed since ({len(changed)} files, the first {changed[0]}: bytes "
            f"and time {files.get(changed[0])}, now {now.get(changed[0])})"
        )
    reasons += [
        f"{name} was {begun.get(name)}, now {work[name]}"
        for name in ("dtypes", "format")
        if begun.get(name) != work[name]
    ]
    if reasons:
        raise UserError(
            f"a conversion to this --dst was begun in {folder} and cannot be continued: "
            f"{'; '.join(reasons)}. Give --restart to begin anew"
        )

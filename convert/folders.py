"""Folders that appear complete or not at all."""

import contextlib
import os
import pathlib
import shutil
from collections.abc import Iterator

from wan_jax.errors import UserError
from wan_jax.storage import folder_lock
from wan_jax.storage.model_dir import MANIFEST, previous_folder
from wan_jax.storage.paths import expand

JOURNAL = ".conversion.jsonl"  # the journal of a conversion; not part of the finished folder


def partial_folder(destination: pathlib.Path) -> pathlib.Path:
    """Return the temporary folder in which `destination` is prepared."""
    destination = expand(destination)
    return destination.parent / f".{destination.name}.partial"


@contextlib.contextmanager
def whole_folder(
    destination: pathlib.Path, overwrite: bool, *, resumable: bool = False
) -> Iterator[pathlib.Path]:
    """Yield a partial folder, which is renamed to `destination` when the block ends normally.

    If it is not resumable, the partial folder is removed after any failure, and the next call
    empties what a killed process left. If it is resumable, it is yielded with its contents and kept
    after Ctrl-C, a full disk or any other error, except a `UserError` in the call that created it.

    An existing destination stays in place until the new folder is complete. At every instant a
    complete folder has the name of the destination or of `previous_folder`; the next call, or
    `recover`, renames the latter back.

    Raises `UserError` when the destination exists and `overwrite` is false, when it exists and is
    not a folder with a model, and when another process writes to the same destination.
    """
    destination = expand(destination)
    partial, previous = partial_folder(destination), previous_folder(destination)
    recover(destination)
    _check_destination(destination, overwrite)
    destination.parent.mkdir(parents=True, exist_ok=True)
    with folder_lock.locked_file(
        partial.with_name(partial.name + "-lock"), str(destination), "--dst"
    ):
        keep = resumable and partial.exists()
        partial.mkdir(exist_ok=True)
        _remove_leftovers(destination)
        if not resumable:
            for path in partial.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        try:
            yield partial
            for path in partial.rglob("*"):
                if path.is_file():
                    with open(path, "rb") as file:
                        os.fsync(file.fileno())
            # the work is complete: an error from here on does not discard it
            keep = resumable
            _check_destination(destination, overwrite)
            try:
                if destination.exists():
                    destination.rename(previous)
                partial.rename(destination)
            except BaseException:
                recover(destination)
                raise
            (destination / JOURNAL).unlink(missing_ok=True)
            _remove_leftovers(destination)
        except BaseException as error:
            if not resumable or (isinstance(error, UserError) and not keep):
                shutil.rmtree(partial, ignore_errors=True)
            raise


def recover(destination: pathlib.Path) -> None:
    """Rename the previous folder back if a process was killed while it replaced the folder."""
    previous = previous_folder(destination)
    if previous.exists() and not destination.exists():
        previous.rename(destination)


def _check_destination(destination: pathlib.Path, overwrite: bool) -> None:
    if not destination.exists():
        return
    if not overwrite:
        raise UserError(
            f"{destination} exists already; remove it, choose another --dst, or give --overwrite"
        )
    if not destination.is_dir() or (
        any(destination.iterdir())
        and not any((destination / name).is_file() for name in (MANIFEST, "model_index.json"))
    ):
        raise UserError(
            f"{destination} exists and is not a model folder, so --overwrite does not replace it; "
            "choose another --dst or remove it yourself"
        )


def _remove_leftovers(destination: pathlib.Path) -> None:
    """Remove the previous folder once the destination exists, and the rest of earlier removals.

    The folder is renamed before it is removed, so that a folder named `previous_folder` is always
    complete.
    """
    previous = previous_folder(destination)
    removed = previous.with_name(previous.name + "-removed")
    shutil.rmtree(removed, ignore_errors=True)
    if previous.exists() and destination.exists():
        previous.rename(removed)
        shutil.rmtree(removed, ignore_errors=True)

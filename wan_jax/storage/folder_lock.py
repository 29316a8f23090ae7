"""Locks that keep a second process out of a folder that one is writing.

The lock is held by `flock` on a small file, so the system releases it when the process ends, by
SIGKILL too. The file names its holder and holds a random token: processes on other hosts read it to
check that they see the same folder, and the holder notices when its folder is moved away. A normal
end removes the file; one that was left is taken over.

Linux passes `flock` to the server on NFS, and on Lustre mounted with -o flock, so there it also
holds between hosts. Where a file system has no locks, a warning is printed and the work goes on
without.
"""

import contextlib
import dataclasses
import datetime
import errno
import fcntl
import json
import os
import pathlib
import secrets
import socket
import sys
from collections.abc import Iterator

from wan_jax.errors import UserError

NAME = ".lock"  # in the folder


@dataclasses.dataclass(frozen=True)
class Lock:
    """A lock that this process holds."""

    path: pathlib.Path
    content: str  # of the file: JSON

    def check_held(self) -> None:
        """Raises `UserError` when the folder was moved away, removed or replaced since it was
        locked.
        """
        try:
            held = self.path.read_text(encoding="utf-8") == self.content
        except (FileNotFoundError, NotADirectoryError):
            held = False
        if not held:
            raise UserError(
                f"{self.path.parent} was moved, removed or replaced while this program was writing "
                "to it; put it back and run the same command again"
            )


def read(path: pathlib.Path) -> str | None:
    """The content of a lock file; None where it cannot be read. Not from a network file system's
    cache.
    """
    try:
        # opening the folder makes an NFS client ask the server what is in it
        os.scandir(path.parent).close()
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


@contextlib.contextmanager
def locked(folder, flag: str) -> Iterator[Lock]:
    """Keeps `folder` for this process, and makes it where it does not exist; one that stays empty
    is removed again.

    flag: the command-line flag that chooses the folder, for messages. Raises `UserError` when
    another process holds the folder, and instead of an error that comes up after the folder was
    moved away or removed.
    """
    folder = pathlib.Path(folder).absolute()
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with locked_file(folder / NAME, str(folder), flag) as lock:
            try:
                yield lock
            except UserError:
                raise
            except Exception:
                lock.check_held()
                raise
    finally:
        with contextlib.suppress(OSError):  # not empty
            for path in made:
                path.rmdir()


@contextlib.contextmanager
def locked_file(path: pathlib.Path, what: str, flag: str) -> Iterator[Lock]:
    """Holds the lock file `path`.

    what, flag: what it protects and the flag that chooses it, for the `UserError` when another
    process holds it.
    """
    handle = _open_locked(path, what, flag)
    try:
        content = json.dumps(
            {
                "process": os.getpid(),
                "host": socket.gethostname(),
                "token": secrets.token_hex(16),
                "since": datetime.datetime.now().isoformat(" ", "seconds"),
            }
        )
        os.ftruncate(handle, 0)
        os.pwrite(handle, content.encode(), 0)
        os.fsync(handle)
        yield Lock(path, content)
    finally:
        if _is_at(handle, path):
            # while it is locked, so that nobody locks a file that has no name any more
            path.unlink(missing_ok=True)
        os.close(handle)


def _open_locked(path: pathlib.Path, what: str, flag: str) -> int:
    """The descriptor of the lock file, locked."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                os.close(handle)
                raise UserError(
                    f"{what} is in use by {_holder(read(path))}; wait for it to end, or choose "
                    f"another {flag}"
                ) from None
            print(
                f"warning: the file system of {what} has no locks ({error.strerror}): nothing "
                "keeps a second process from writing there",
                file=sys.stderr,
                flush=True,
            )
        if _is_at(handle, path):
            return handle
        os.close(handle)  # its holder removed it between the two calls


def _is_at(handle: int, path: pathlib.Path) -> bool:
    """Whether the open file is the one that `path` names."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except OSError:
        return False


def _holder(content: str | None) -> str:
    try:
        known = json.loads(content or "")
        return f"process {known['process']} on {known['host']} (since {known['since']})"
    except (ValueError, KeyError, TypeError):
        return "another process"

"""Locks that keep a second process from writing to a folder.

The lock is a `flock` on a small file, so the system releases it when the process ends, even by
SIGKILL. The file names its owner and contains a random token: processes on other hosts read it to
check that they see the same folder, and the owner notices when its folder is moved. A normal end
removes the file; one that was left is taken over.

Linux passes `flock` to the server on NFS, and on Lustre mounted with -o flock, so there it also
works between hosts. If a file system has no locks, a warning is printed and the work continues
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

NAME = ".lock"  # of the file in the folder


@dataclasses.dataclass(frozen=True)
class Lock:
    """A lock that this process owns."""

    path: pathlib.Path
    content: str  # of the file, JSON

    def check_held(self) -> None:
        """Raise `UserError` when the folder was moved, removed or replaced since it was locked."""
        try:
            unchanged = self.path.read_text(encoding="utf-8") == self.content
        except (FileNotFoundError, NotADirectoryError):
            unchanged = False
        if not unchanged:
            raise UserError(
                f"{self.path.parent} was moved, removed or replaced while this program was writing "
                "to it; put it back and run the same command again"
            )


def read(path: pathlib.Path) -> str | None:
    """Return the content of a lock file, not from the cache of a network file system; None if it
    cannot be read.
    """
    try:
        # opening the folder makes an NFS client ask the server what is in it
        os.scandir(path.parent).close()
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


@contextlib.contextmanager
def locked(folder, flag: str) -> Iterator[Lock]:
    """Lock `folder` for this process; it is created if it does not exist, and removed again if it
    stays empty.

    flag: the command-line flag that chooses the folder, for messages. Raises `UserError` when
    another process has locked the folder, and instead of any other error after the folder was moved
    or removed.
    """
    folder = pathlib.Path(folder).absolute()
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with locked_file(folder / NAME, str(folder), flag) as lock:
            try:
                yield lock
            except UserError:
                raise
            # Broad, because any error may be the consequence of a moved folder, which is reported
            # instead; other errors are raised again.
            except Exception:
                lock.check_held()
                raise
    finally:
        with contextlib.suppress(OSError):  # not empty
            for path in created:
                path.rmdir()


@contextlib.contextmanager
def locked_file(path: pathlib.Path, what: str, flag: str) -> Iterator[Lock]:
    """Lock the file `path`.

    what, flag: what it protects and the flag that chooses it, for the `UserError` when another
    process has locked it.
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
            # still locked, so that nobody can lock a file that has no name any more
            path.unlink(missing_ok=True)
        os.close(handle)


def _open_locked(path: pathlib.Path, what: str, flag: str) -> int:
    """Open the lock file, lock it, and return its descriptor."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                os.close(handle)
                raise UserError(
                    f"{what} is in use by {_owner(read(path))}; wait for it to end, or choose "
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
        os.close(handle)  # its owner removed it between the two calls


def _is_at(handle: int, path: pathlib.Path) -> bool:
    """Return whether the open file is the one that `path` names."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except OSError:
        return False


def _owner(content: str | None) -> str:
    """Return the owner of a lock file as text, for messages."""
    try:
        known = json.loads(content or "")
        return f"process {known['process']} on {known['host']} (since {known['since']})"
    except (ValueError, KeyError, TypeError):
        return "another process"

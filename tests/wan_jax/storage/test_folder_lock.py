"""Two processes cannot write to one folder."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from wan_jax.command_line.cli import UserError
from wan_jax.storage import folder_lock
from wan_jax.storage.folder_lock import NAME, locked

HOLD = """
import sys, time
from wan_jax.storage.folder_lock import locked
with locked(sys.argv[1], "--config.run_dir"):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_process_is_refused_and_a_killed_one_leaves_no_lock(tmp_path):
    folder = tmp_path / "runs" / "one"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, folder], stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout.readline() == "held\n"
        with pytest.raises(UserError) as error, locked(folder, "--config.run_dir"):
            pass
        for part in (str(folder), f"process {first.pid}", socket.gethostname(), "--config.run_dir"):
            assert part in str(error.value)
        first.send_signal(signal.SIGKILL)
    assert (folder / NAME).exists()
    with locked(folder, "--config.run_dir") as lock:
        assert json.loads((folder / NAME).read_text())["process"] == os.getpid()
        lock.check_held()
    assert not list(folder.iterdir())


def test_what_was_there_or_was_written_stays(tmp_path):
    with (
        locked(tmp_path / "old", "--out"),
        pytest.raises(UserError),
        locked(tmp_path / "old", "--out"),
    ):
        pass
    assert not (tmp_path / "old").exists()  # nothing was written
    (tmp_path / "old").mkdir()
    with locked(tmp_path / "old", "--out"), locked(tmp_path / "new", "--out"):
        (tmp_path / "new" / "file").write_text("")
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == [
        "new",
        "new/file",
        "old",
    ]


@pytest.mark.parametrize("replaced", [False, True])
def test_a_folder_that_is_moved_away_is_one_message(tmp_path, replaced):
    """Also where another run has begun in its place, whose lock stays."""
    folder = tmp_path / "run"
    with (
        pytest.raises(UserError, match=str(folder)),
        locked(folder, "--out") as lock,
    ):
        folder.rename(tmp_path / "moved")
        if replaced:
            folder.mkdir()
            (folder / NAME).write_text("another")
            lock.check_held()
        (folder / "metrics.jsonl").open("r+")
    assert (folder / NAME).exists() == replaced


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(ZeroDivisionError), locked(tmp_path, "--out"):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_a_lock_file_that_its_holder_removes_is_not_taken(tmp_path, monkeypatch):
    """Its holder ends between this process's open and flock: the file that is locked must be the
    one in the folder.
    """
    flock, removed = fcntl.flock, []

    def late(handle, how):
        if not removed:
            removed.append((tmp_path / NAME).unlink())
        flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with locked(tmp_path, "--out") as lock:
        lock.check_held()
        with pytest.raises(UserError), locked(tmp_path, "--out"):
            pass


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(folder_lock.fcntl, "flock", unsupported)
    with locked(tmp_path, "--out") as lock:
        lock.check_held()
    assert f"{tmp_path} has no locks (No locks available)" in capsys.readouterr().err

"""Small files of a run: read with a warning, replaced as a whole."""

import errno
import os

import pytest

from grpo.records import run_files
from grpo.records.run_files import read_json, write_atomically


def test_a_file_is_replaced_as_a_whole(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_atomically(path, b'{"a": 1}')
    write_atomically(path, b'{"a": 2}')
    assert read_json(path) == {"a": 2} and list(tmp_path.iterdir()) == [path]

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b'{"a": 3}')
    assert read_json(path) == {"a": 2} and list(tmp_path.iterdir()) == [path]


def test_a_missing_file_is_no_warning(tmp_path, capsys):
    assert read_json(tmp_path / "none.json") == {} and capsys.readouterr().err == ""


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "[" * 100_000], ids=lambda t: repr(t[:4]))
def test_a_file_that_cannot_be_read_is_named(tmp_path, capsys, text):
    path = tmp_path / "a.json"
    path.write_text(text)
    assert read_json(path) == {} and read_json(path) == {}
    assert capsys.readouterr().err.count(str(path)) == 1, "one warning for one file"


def test_a_warning_is_printed_once(capsys):
    for text in ("one of test_run_files", "two of test_run_files", "one of test_run_files"):
        run_files.warn(text)
    assert capsys.readouterr().err.splitlines() == [
        "warning: one of test_run_files",
        "warning: two of test_run_files",
    ]

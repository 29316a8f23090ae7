"""The file of what a run prints."""

import datetime
import logging
import sys

import pytest

from grpo.records import run_output
from wan_jax.errors import UserError


def lines(folder):
    """The lines of the file, without their times."""
    found = (folder / run_output.OUTPUT).read_text().splitlines()
    for line in found:
        datetime.datetime.fromisoformat(line.split(" ", 1)[0])
    return [line.split(" ", 1)[1] for line in found]


def test_lines_are_copied_with_their_time_once_the_run_begins(tmp_path, capsys):
    begins, before = tmp_path / "config.json", (sys.stdout, sys.stderr)
    with pytest.raises(UserError, match="no"), run_output.recorded(begins):
        print("before", "it begins", sep="\n")
        assert not list(tmp_path.iterdir())
        begins.touch()
        print("half", end=" ")
        print("a line\n\n", file=sys.stderr)
        print("of it")
        print("\r10 %\r20 %\rthe end", file=sys.stderr)
        logging.getLogger("rewards").warning("a server is gone")
        raise UserError("no")
    assert lines(tmp_path) == [
        "before",
        "it begins",
        "a line",
        "half of it",
        "the end",
        "warning: a server is gone",
        "error: no",
    ]
    captured = capsys.readouterr()
    assert captured.out == "before\nit begins\nhalf of it\n"
    assert (sys.stdout, sys.stderr) == before


def test_a_run_that_is_refused_leaves_no_file(tmp_path):
    with pytest.raises(UserError), run_output.recorded(tmp_path / "config.json"):
        raise UserError("no")
    assert not list(tmp_path.iterdir())


def test_an_unknown_error_is_copied_with_its_traceback(tmp_path):
    (tmp_path / "config.json").touch()
    with pytest.raises(ZeroDivisionError), run_output.recorded(tmp_path / "config.json"):
        print(1 / 0)
    assert lines(tmp_path)[-1] == "ZeroDivisionError: division by zero"


def test_a_fault_of_the_disk_is_a_warning(tmp_path, capsys):
    (tmp_path / "config.json").touch()
    (tmp_path / run_output.OUTPUT).mkdir()
    with run_output.recorded(tmp_path / "config.json"):
        print("one", "two", sep="\n")
    captured = capsys.readouterr()
    assert captured.out == "one\ntwo\n" and captured.err.count("is not continued") == 1

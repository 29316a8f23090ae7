"""Tests how `benchmarks.kills` counts, with shell scripts instead of the command, for speed."""

import collections

import numpy as np
import pytest

from benchmarks import kills
from tests import commands


@pytest.fixture
def chain(tmp_path, monkeypatch):
    """Return a function that replaces the command of a run by a shell script."""
    chain = kills.Chain([], tmp_path / "run", collections.defaultdict(collections.Counter))
    (chain.run / "checkpoints/3").mkdir(parents=True)
    monkeypatch.setattr(commands, "SERVER", False)

    def command(script):
        monkeypatch.setattr(commands, "command", lambda *_: ["sh", "-c", script])
        return chain

    return command


@pytest.mark.parametrize(
    "script, wanted",
    [
        ("echo 'error: the disk is full' >&2; exit 1", [("fault", True)]),
        ("echo 'error: one' >&2; echo 'error: two' >&2; exit 1", [("fault", False)]),
        (f"echo '{kills.TRACEBACK}:' >&2; echo 'error: one' >&2; exit 1", [("fault", False)]),
        ("exit 1", [("fault", False)]),
        ("exit 0", []),
    ],
)
def test_a_fault_is_taken_well_with_one_message(chain, script, wanted):
    run = chain(script)
    run.suffer("fault")
    assert run.faults == wanted and run.rows["fault"]["tracebacks"] == (kills.TRACEBACK in script)


def test_epochs_after_which_a_killed_run_does_not_continue_are_lost(chain, monkeypatch):
    chain("echo ready; sleep 60").suffer("fault", lambda out, run: "ready" in out, kills.kill)
    monkeypatch.setattr(kills, "result", lambda run: {"a": 1})
    run = chain("echo 'continuing RUN after epoch 1'")
    run.finish({"a": 2})
    assert run.rows["fault"] == {"tracebacks": 0, "lost": 2, "tried": 1, "survived": 0, "silent": 1}
    assert kills.table(run.rows)[-1] == "| all | 1 | 0 | 2 | 1 | 0 |"


def test_what_differs_is_named():
    a = {"x": np.float32(0.5), "y": [1, np.nan]}
    assert kills.difference(a, {"x": np.float32(0.5), "y": [1, np.nan]}) == ""
    assert kills.difference(a, a | {"x": np.float64(0.5)}) == "1 differ, first x"
    assert kills.difference(a, {"x": np.float32(0.5), "z": 1}) == "2 differ, first y"

"""Tests of the journal: what is recorded, what a kill leaves, and which work it belongs to."""

import pytest

from convert.folders import JOURNAL
from convert.journal import Journal
from wan_jax.errors import UserError

WORK = {"format": 1, "dtypes": {"vae": "float32"}, "files": {"a": [3, 5]}}


def test_the_next_run_knows_the_finished_tensors(tmp_path):
    journal = Journal(tmp_path, WORK)
    journal.add("vae", ["x", "y"])
    journal.add("text_encoder", ["z"])
    journal.forget("text_encoder")
    journal.forget("transformer")
    again = Journal(tmp_path, WORK)
    assert again.done("vae") == {"x", "y"} and again.done("text_encoder") == set()


def test_an_incomplete_line_is_left_out_and_does_not_swallow_the_next(tmp_path):
    Journal(tmp_path, WORK).add("vae", ["x"])
    with open(tmp_path / JOURNAL, "a") as file:
        file.write('{"component": "vae", "ke')
    Journal(tmp_path, WORK).add("vae", ["y"])
    assert Journal(tmp_path, WORK).done("vae") == {"x", "y"}


@pytest.mark.parametrize(
    "change, named",
    [
        ({"format": 2}, "format was 1, is 2"),
        ({"dtypes": {"vae": "bfloat16"}}, "dtypes was .*float32.*bfloat16"),
        ({"files": {"a": [3, 6]}}, "the first is a:"),
        ({"files": {"a": [3, 5], "b": [1, 1]}}, "the first is b:"),
    ],
)
def test_other_work_is_refused_unless_restarted(tmp_path, change, named):
    Journal(tmp_path, WORK).add("vae", ["x"])
    (tmp_path / "vae").mkdir()
    with pytest.raises(UserError, match=rf"{named}.*--restart"):
        Journal(tmp_path, WORK | change)
    assert Journal(tmp_path, WORK | change, restart=True).done("vae") == set()
    assert [path.name for path in tmp_path.iterdir()] == [JOURNAL]

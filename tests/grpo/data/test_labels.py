"""Pairs and ratings of data: what is read, and that a bad line is named by its number."""

import dataclasses
import json

import numpy as np
import pytest

from grpo.data.labels import PAIRS, RATINGS, read_labels
from grpo.data.latent_folder import Kind, Writer, open_data
from tests.grpo.data_folders import MODEL
from wan_jax.errors import UserError


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Items a, b, c of one prompt and d of another, in two shards. Nothing but the size of their
    latents tells that d's are other ones.
    """
    folder = tmp_path_factory.mktemp("labels") / "data"
    folder.mkdir()
    writer = Writer(folder, Kind(None, 16, 32, 1, None, "float32", "files"))
    keys = [(f"{name}.png", name, "sea") for name in "abc"]
    writer.add(keys, [np.zeros((1, 2, 4, 16))] * 3, [np.ones((2, 12))] * 3)
    writer.add([("d.png", "d", "sky")], [np.zeros((1, 4, 4, 16))], [np.ones((2, 12))])
    return open_data(folder, MODEL)


@pytest.fixture
def read(data, tmp_path):
    def read(kind, *lines, data=data):
        path = tmp_path / "labels.jsonl"
        path.write_text("".join(f"{x if isinstance(x, str) else json.dumps(x)}\n" for x in lines))
        return read_labels(str(path), data, kind)

    return read


def pair(preferred, rejected, **more):
    return {"preferred": f"{preferred}.png", "rejected": f"{rejected}.png"} | more


def rating(name, score, **more):
    return {"file": f"{name}.png", "score": score} | more


def test_pairs(read):
    labels = read(PAIRS, pair("b", "a", prompt="sea"), "", pair("c", "b"), pair("b", "a"))
    assert labels.items.tolist() == [1, 2, 1] and labels.rejected.tolist() == [0, 1, 0]
    assert labels.scores is None and len(labels) == 3
    again = read(PAIRS, pair("b", "a"), pair("c", "b"), pair("b", "a"))
    assert again.digest == labels.digest
    assert read(PAIRS, pair("a", "b"), pair("c", "b"), pair("b", "a")).digest != labels.digest


def test_ratings(read):
    labels = read(RATINGS, rating("d", 1), rating("a", 0.25, prompt="sea"))
    assert labels.items.tolist() == [3, 0] and labels.rejected is None
    assert labels.scores.dtype == np.float64 and labels.scores.tolist() == [1.0, 0.25]


@pytest.mark.parametrize(
    "kind, line, found",
    [
        (PAIRS, "a,b", "not JSON"),
        (PAIRS, [1], r'a line is {"preferred'),
        (PAIRS, rating("a", 1.0), r'a line is {"preferred'),
        (PAIRS, pair("a", "b", score=1.0), r'a line is {"preferred'),
        (PAIRS, {"preferred": "a.png", "rejected": 1}, r'a line is {"preferred'),
        (PAIRS, pair("a", "x"), "'x.png' is not among the 4 items"),
        (PAIRS, pair("a", "a"), "'a.png' and 'a.png' are the same file"),
        (PAIRS, pair("a", "d"), "'a.png' and 'd.png' have different prompts, 'sea' and 'sky'"),
        (PAIRS, pair("a", "b", prompt="sun"), "'sea', not 'sun'"),
        (RATINGS, pair("a", "b"), r'a line is {"file'),
        (RATINGS, rating("a", True), r'a line is {"file'),
        (RATINGS, rating("a", "1"), r'a line is {"file'),
        (RATINGS, rating("a", float("nan")), "score nan is not finite"),
        (RATINGS, rating("x", 1.0), "'x.png' is not among the 4 items"),
        (RATINGS, rating("c", 1.0), "'c.png' has a score already, in line 1"),
        (RATINGS, rating("a", 1.0, prompt="sky"), "'sea', not 'sky'"),
    ],
)
def test_a_bad_line_is_named(read, kind, line, found):
    good = pair("c", "b") if kind == PAIRS else rating("c", 0.5)
    with pytest.raises(UserError, match=r"config\.data\.labels=.*, line 3: ") as error:
        read(kind, good, "", line)
    message = str(error.value)
    assert found.replace("\\", "") in message and "\n" not in message


def test_latents_of_unequal_shapes(read, data):
    """Of data that another program wrote: within ours one size is checked."""
    same = dataclasses.replace(data.items[3], prompt="sea")
    strange = dataclasses.replace(data, items=(*data.items[:3], same))
    with pytest.raises(UserError, match=r"line 1: 'a.png' and 'd.png' have latents of \[1, 2"):
        read(PAIRS, pair("a", "d"), data=strange)


def test_files_that_teach_nothing(read, data, tmp_path):
    with pytest.raises(UserError, match="has no line"):
        read(PAIRS, "")
    with pytest.raises(UserError, match=r"all 2 scores are 0\.5"):
        read(RATINGS, rating("a", 0.5), rating("b", 0.5))
    with pytest.raises(UserError, match="does not exist"):
        read_labels(str(tmp_path / "none.jsonl"), data, PAIRS)

"""The shipped parts of tiny-wan without weights are what the code writes."""

import pathlib

import pytest

from examples.tiny_wan.assemble import assemble

TINY_WAN = pathlib.Path(__file__).parents[3] / "assets/tiny-wan"
FILES = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("tiny-wan")
    assemble(out)
    return out


@pytest.mark.parametrize("name", FILES)
def test_file_is_the_shipped_one(folder, name):
    assert (folder / name).read_bytes() == (TINY_WAN / name).read_bytes()


def test_nothing_else_is_written(folder):
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert found == set(FILES)

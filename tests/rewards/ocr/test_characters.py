"""The characters that the engines can read."""

import importlib.util
import pathlib

import pytest

from rewards.ocr import characters


def test_the_readable_characters_are_those_of_the_network():
    runtime = pytest.importorskip("onnxruntime")
    folder = pathlib.Path(importlib.util.find_spec("rapidocr").submodule_search_locations[0])
    session = runtime.InferenceSession(next(folder.glob("models/*_rec_*.onnx")))
    listed = session.get_modelmeta().custom_metadata_map["character"].split("\n")
    assert (
        characters.readable_characters("rapidocr") == set(listed) - {""} | {" "}
        and len(listed) > 18_000
    )
    # the outputs are these, one for nothing, and one for a space
    assert session.get_outputs()[0].shape[-1] in (len(listed) + 1, len(listed) + 2)


def test_the_readable_characters_in_a_text_file(monkeypatch, tmp_path):
    (tmp_path / "package").mkdir()
    (tmp_path / "package/__init__.py").touch()
    (tmp_path / "package/dict.txt").write_text("A\nB\né\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(characters.CHARACTER_LISTS, "paddleocr", ("package", "dict.txt"))
    assert characters.readable_characters("paddleocr") == set("ABé ")


@pytest.mark.parametrize(
    "place", [("no_such_package", "models/*.onnx"), ("rapidocr", "no_such_folder/*")]
)
def test_a_list_of_characters_that_is_missing(monkeypatch, place):
    monkeypatch.setitem(characters.CHARACTER_LISTS, "rapidocr", place)
    assert characters.readable_characters("rapidocr") is None

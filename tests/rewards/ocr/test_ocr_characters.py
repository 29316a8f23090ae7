"""Which characters an OCR engine can read, and prompts that ask for others."""

import importlib.util
import pathlib
import re

import pytest

from configs.defaults import defaults
from grpo.data.prompts import load_prompts
from grpo.scoring.scores import targets_check
from rewards.ocr import engines
from rewards.ocr.rules import make_readable_check
from rewards.ocr.targets import parse_targets
from wan_jax.command_line.cli import UserError


def test_the_list_is_the_one_of_the_network():
    runtime = pytest.importorskip("onnxruntime")
    folder = pathlib.Path(importlib.util.find_spec("rapidocr").submodule_search_locations[0])
    session = runtime.InferenceSession(next(folder.glob("models/*_rec_*.onnx")))
    listed = session.get_modelmeta().custom_metadata_map["character"].split("\n")
    assert (
        engines.readable_characters("rapidocr") == set(listed) - {""} | {" "}
        and len(listed) > 18_000
    )
    # the outputs are these, one for nothing, and one for a space
    assert session.get_outputs()[0].shape[-1] in (len(listed) + 1, len(listed) + 2)


def test_a_list_that_is_not_found_checks_nothing(monkeypatch, tmp_path):
    monkeypatch.setitem(engines.CHARACTER_LISTS, "rapidocr", ("no_such_package", "models/*.onnx"))
    assert make_readable_check("rapidocr") is None
    monkeypatch.setitem(engines.CHARACTER_LISTS, "rapidocr", ("rapidocr", "no_such_folder/*"))
    assert make_readable_check("rapidocr") is None


def test_a_list_in_a_text_file(monkeypatch, tmp_path):
    (tmp_path / "package").mkdir()
    (tmp_path / "package/__init__.py").touch()
    (tmp_path / "package/dict.txt").write_text("A\nB\né\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(engines.CHARACTER_LISTS, "paddleocr", ("package", "dict.txt"))
    assert engines.readable_characters("paddleocr") == set("ABé ")
    check = make_readable_check("paddleocr")
    # case, accents as characters of their own and width are disregarded
    check(("a B É", "be\u0301", "Ａ"))
    with pytest.raises(ValueError, match=r"cannot read C, d of 'ACdC'"):
        check(("A", "ACdC"))


def test_prompts_that_cannot_be_read_are_told_by_line(tmp_path):
    path, c = tmp_path / "a.jsonl", defaults().reward
    path.write_text(
        '{"prompt": "A \\"OPEN\\""}\n{"prompt": "A \\"МОСКВА\\""}\n{"prompt": "x", "targets": '
        '["서울"]}\n',
        encoding="utf-8",
    )
    with pytest.raises(UserError, match=re.escape("2 of 3 lines cannot be scored")) as error:
        load_prompts(path, parse_targets, check=targets_check(c))
    for part in (
        "line 2: the OCR engine rapidocr cannot read М, О, С, К, В, А of 'МОСКВА'",
        "line 3: ",
        "서, 울",
    ):
        assert part in str(error.value)
    c.weights.ocr = 0.0
    assert targets_check(c) is None
    c.weights.ocr, c.servers = 1.0, ("http://host:8000",)
    assert targets_check(c) is None

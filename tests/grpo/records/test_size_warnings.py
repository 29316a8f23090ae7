"""The line about videos below the size that a model is published for."""

import pytest

from grpo.records.size_warnings import size_warnings
from tests.grpo.specs import tiny_spec

NATIVE = {"sample.height": 480, "sample.width": 832}


@pytest.mark.parametrize(
    ("model", "values", "found"),
    [
        ("wan2.1-1.3b", NATIVE, ()),
        ("wan2.1-1.3b", {"sample.height": 832, "sample.width": 480}, ()),
        ("wan2.1-1.3b", {}, ("16 x 32:", "480 x 832", "10 pixels", "text_area")),
        ("wan2.1-1.3b", NATIVE | {"eval.more_sizes": ((240, 416, 1),)}, ("240 x 416:",)),
        ("wan2.2-ti2v-5b", NATIVE, ("480 x 832:", "704 x 1280", "Flow-Factory")),
        ("wan2.2-ti2v-5b", {"sample.height": 704, "sample.width": 1280}, ()),
    ],
)
def test_sizes_below_the_published_ones(model, values, found):
    lines = size_warnings(tiny_spec(model, **values))
    assert len(lines) == bool(found)
    assert all(text in lines[0] for text in found)


def test_the_text_is_only_named_where_it_is_read_and_not_measured():
    for values in (
        {"reward.panel": ("text_area",)},
        {"reward.weights.ocr": None, "reward.weights.edges": 1.0},
    ):
        (line,) = size_warnings(tiny_spec(**values))
        assert "480 x 832" in line and "OCR" not in line

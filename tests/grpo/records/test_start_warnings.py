"""The lines about videos below the size that a model is published for, and about steps without noise."""

import pytest

from grpo.records.start_warnings import noise_warnings, size_warnings, start_warnings
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


@pytest.mark.parametrize(
    ("values", "warned"),
    [
        ({"sample.sde": "cps"}, True),
        ({"sample.sde": "cps", "sample.sde_range": (0, 2)}, False),
        ({"sample.sde": "flow_sde"}, False),
        ({"train.method": "nft", "train.timesteps": 2}, False),
    ],
)
def test_a_trained_step_without_noise_is_named(values, warned):
    """CPS scales its noise by the noise level after the step, which is 0 after the last one."""
    values = {"sample.steps": 3, "sample.sde_range": (0, 3), "sample.sde_steps": 2} | values
    spec = tiny_spec("wan2.1-1.3b", **NATIVE, **values)
    lines = noise_warnings(spec)
    assert len(lines) == warned and start_warnings(spec) == lines
    assert all("step 2 of sample.sde_range=(0, 3)" in line for line in lines)

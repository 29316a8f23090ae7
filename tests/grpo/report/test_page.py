"""Templates of the pages."""

import jinja2
import pytest

from grpo.report.page import render

COMPARISON = dict(
    title="t",
    heading="a < b",
    headline="",
    remarks=["<i>"],
    charts={},
    head=[],
    rows=[],
    colors=[],
    methods=[["m", "'r'.py"]],
    command="<x>",
)


def test_text_is_escaped():
    text = render("comparison.html", **COMPARISON)
    assert text.startswith("<!DOCTYPE html>") and "<h1>a &lt; b</h1>" in text
    assert '<p class="note">&lt;i&gt;</p>' in text and "<pre>&lt;x&gt;</pre>" in text
    assert '<th scope="row">m</th><td>&#39;r&#39;.py</td>' in text
    assert "--heldout: #2368c4" in text, "the style sheet is part of the page"


def test_an_interval_stays_in_one_line():
    text = render(
        "comparison.html",
        **COMPARISON | dict(headline="a < 0.83 [0.76, 0.89], b 0.9 ± 0.03 (95 %)", methods=[]),
    )
    assert (
        'a &lt; <span class="interval">0.83 [0.76, 0.89]</span>, b <span class="interval">0.9 ± 0.03'
        "</span> (95 %)" in text
    )
    assert ".interval, .numbers th, .numbers td { white-space: nowrap; }" in text


@pytest.mark.parametrize("missing", ["heading", "remarks", "rows", "methods", "command"])
def test_a_value_that_is_not_given_is_an_error(missing):
    values = {name: value for name, value in COMPARISON.items() if name != missing}
    with pytest.raises(jinja2.UndefinedError, match=missing):
        render("comparison.html", **values)


def test_dots_are_in_the_rows_first_cells():
    rows = [["a", "1"], ["b", "2"], ["c", "3"]]
    empty = dict(wide="", narrow="", caption="")
    text = render(
        "comparison.html",
        **COMPARISON
        | dict(
            head=["x", "y"],
            rows=rows,
            colors=["s0", "s4"],
            charts=dict(evaluations=empty, seconds=empty),
        ),
    )
    assert '<tr><th scope="row"><i class="dot s4"></i>b</th><td>2</td></tr>' in text
    assert '<tr><th scope="row">c</th><td>3</td></tr>' in text

"""Charts: inline SVG in the page's colours."""

import re

from grpo.report.charts import COLORS, SIZES, chart


def draw(axes):
    for i in range(4):
        axes.plot([0, 1], [i, 2 * i], color=COLORS[f"s{i}"], label=f"series {i}")
    axes.set_xlabel("epoch")
    axes.set_ylabel("<reward>")


def test_colours_are_variables_and_no_two_are_equal():
    made = chart(draw, "caption", "label", columns=4)
    assert len(set(COLORS.values())) == len(COLORS)
    for svg in (made.wide, made.narrow):
        assert not re.search("#[0-9a-f]{6}", svg)
        for name in ("s0", "s3", "grid", "muted", "text"):
            assert f"var(--{name})" in svg, name


def test_an_svg_stands_alone():
    made = chart(draw, "caption", 'a "quoted" <label>')
    for svg in (made.wide, made.narrow):
        assert svg.startswith('<svg role="img" aria-label="a &#34;quoted&#34; &lt;label&gt;" ')
        assert "&lt;reward&gt;" in svg and "series 3" in svg
        assert "http" not in svg and "<metadata" not in svg and "xmlns" not in svg
    assert made.caption == "caption"


def test_equal_data_give_equal_charts():
    assert chart(draw, "", "") == chart(draw, "", "")


def test_a_legend_of_more_rows_makes_the_chart_higher():
    def height(svg):
        return float(re.search(r'viewBox="0 0 [\d.]+ ([\d.]+)"', svg)[1])

    one_row, two_rows = (chart(draw, "", "", columns=columns) for columns in (4, 2))
    assert height(one_row.wide) == 72 * SIZES["wide"][1]
    assert height(two_rows.wide) > height(one_row.wide)


def test_long_names_of_a_legend_have_rows_of_their_own():
    def long(axes):
        for i in range(2):
            axes.plot([0, 1], [i, i], label=f"a name of many letters {i}")

    made = chart(long, "", "", columns=4)
    assert made.narrow == chart(long, "", "", columns=1).narrow
    assert made.wide != chart(long, "", "", columns=1).wide

"""Draws charts as inline SVG whose colours are CSS variables of the page, or as PNG."""

import dataclasses
import io
import re
from collections.abc import Callable
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# matplotlib draws with these; in the SVG each becomes the CSS variable of the same name, so no two
# may be equal.
COLORS = {
    "heldout": "#2368c4",
    "training": "#d9702b",
    "grid": "#d9d9d4",
    "muted": "#6a6a64",
    "text": "#1c1c1a",
    "s0": "#2368c5",
    "s1": "#1f9a8a",
    "s2": "#e0a020",
    "s3": "#cf6420",
    "s4": "#8a5bc0",
    "s5": "#7d7d76",
}
SERIES = 6  # colours s0 to s5, for stages and methods
SIZES = {"wide": (8.6, 3.6), "narrow": (3.9, 3.2)}  # inches, on wide and on narrow screens
KEY_INCHES, LETTER_INCHES = 0.5, 0.08  # of an entry of the legend
METADATA = ("Date", "Creator", "Format", "Type")  # left out, so that equal data give equal bytes


@dataclasses.dataclass(frozen=True)
class Chart:
    """A chart in two sizes, each an <svg> element that is safe to embed."""

    wide: str
    narrow: str
    caption: str  # plain text below the chart


def chart(draw: Callable[[Axes], None], caption: str, label: str, columns: int = 2) -> Chart:
    """Draw a chart in both sizes.

    Args:
      draw: plots onto the axes it gets, with `COLORS`; names the lines and the axes.
      caption: plain text below the chart.
      label: description for screen readers.
      columns: columns of the legend on wide screens; narrow ones get half as many.
    """
    return Chart(
        _svg(draw, "wide", label, columns),
        _svg(draw, "narrow", label, max(1, columns // 2)),
        caption,
    )


def png(draw: Callable[[Axes], None]) -> bytes:
    """Return a chart in the wide size, with two columns of its legend, as a PNG on white."""
    with rc_context({"font.family": "sans-serif", "font.size": 10}):
        file = io.BytesIO()
        # without the version of matplotlib, so that equal data give equal bytes
        _figure(draw, "wide", 2).savefig(
            file, format="png", dpi=110, facecolor="white", metadata={"Software": None}
        )
    return file.getvalue()


def _figure(draw: Callable[[Axes], None], size: str, columns: int) -> Figure:
    """Return a drawn chart with its legend."""
    # 1 draw
    width, height = SIZES[size]
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    if size == "narrow":
        axes.locator_params(axis="x", nbins=4)
    draw(axes)
    axes.grid(axis="y", color=COLORS["grid"], lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(COLORS["grid"])
    axes.tick_params(colors=COLORS["muted"], length=0)
    axes.xaxis.label.set_color(COLORS["muted"])
    axes.yaxis.label.set_color(COLORS["muted"])
    # 2 put the legend above, and make room for its rows after the first
    labels = axes.get_legend_handles_labels()[1]
    longest = max(map(len, labels), default=0)
    columns = max(1, min(columns, int(width / (KEY_INCHES + LETTER_INCHES * longest))))
    rows = -(-len(labels) // columns)
    figure.set_figheight(height + 0.2 * max(0, rows - 1))
    figure.legend(loc="outside upper left", ncols=columns, frameon=False, labelcolor=COLORS["text"])
    return figure


def _svg(draw: Callable[[Axes], None], size: str, label: str, columns: int) -> str:
    """Return an <svg> element, safe to embed, with the page's colours and typeface."""
    from markupsafe import Markup, escape

    # 1 draw
    style: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": size}
    style |= {"font.family": "sans-serif", "font.size": 10}
    with rc_context(style):
        file = io.StringIO()
        _figure(draw, size, columns).savefig(
            file, format="svg", transparent=True, metadata=dict.fromkeys(METADATA)
        )
    # 2 leave out what inline SVG does not need, such as addresses of name spaces
    svg = file.getvalue()[file.getvalue().index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg.replace("xlink:href", "href"))
    # 3 use the page's typeface and colours
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    for name, color in COLORS.items():
        svg = svg.replace(color, f"var(--{name})")
    return Markup(svg.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1))

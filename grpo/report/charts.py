"""Charts for the pages of `grpo.report.run_report` and `grpo.compare`: inline SVG in the colours of
the page.
"""

import html
import io
import re
from collections.abc import Callable

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from grpo.report.page import COLORS

SIZES = {"wide": (8.6, 3.6), "narrow": (3.9, 3.2)}  # inches, on wide and on narrow screens


def chart(draw: Callable[[Axes], None], caption: str, label: str, columns: int = 2) -> str:
    """<figure> with the chart in both sizes. draw(axes) plots with `COLORS`, names its lines and
    its axes.

    caption: text below; label: what a screen reader says; columns: of the legend, half as many
    where it is narrow.
    """
    charts = "".join(
        f'<div class="{name}">{_svg(draw, name, label, columns if name == "wide" else columns // 2 or 1)}'
        "</div>"
        for name in SIZES
    )
    return f"<figure>{charts}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _svg(draw: Callable[[Axes], None], name: str, label: str, columns: int) -> str:
    """Inline SVG whose colours are the page's CSS variables."""
    with rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif", "font.size": 10}
    ):
        width, height = SIZES[name]
        figure = Figure(figsize=(width, height), layout="constrained")
        ax = figure.add_subplot()
        draw(ax)
        ax.grid(axis="y", color=COLORS["grid"], lw=0.8)
        ax.set_axisbelow(True)
        ax.spines[["top", "right", "left"]].set_visible(False)
        ax.spines["bottom"].set_color(COLORS["grid"])
        ax.tick_params(colors=COLORS["muted"], length=0)
        for text in (ax.xaxis.label, ax.yaxis.label):
            text.set_color(COLORS["muted"])
        lines = len(ax.get_legend_handles_labels()[0])
        figure.set_figheight(height + 0.2 * max(0, -(-lines // columns) - 1))
        figure.legend(
            loc="outside upper left", ncols=columns, frameon=False, labelcolor=COLORS["text"]
        )
        file = io.StringIO()
        figure.savefig(
            file,
            format="svg",
            transparent=True,
            metadata={k: None for k in ("Date", "Creator", "Format", "Type")},
        )
    svg = file.getvalue()[file.getvalue().index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL).replace(
        "xlink:href", "href"
    )
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)  # the page's own typeface
    for role, color in COLORS.items():
        svg = svg.replace(color, f"var(--{role})")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(label)}" ', 1)

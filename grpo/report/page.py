"""Renders `grpo/report/templates`: pages of HTML and CSS, light and dark, wide and narrow, and Markdown."""

import functools
import re

CONFIDENCE = "95\N{NO-BREAK SPACE}%"  # of every interval on the pages
NUMBER = r"[-+]?\d[\d.,]*"
# 0.83 [0.76, 0.89] and 0.89 ± 0.03
INTERVAL = re.compile(rf"(?:{NUMBER} )?\[{NUMBER} {NUMBER}\]|{NUMBER} ± {NUMBER}")


@functools.cache
def _environment():
    # imported here because a command that writes no page should not wait for it
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("grpo.report"),
        autoescape=jinja2.select_autoescape((), disabled_extensions=("md",), default=True),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["unbroken"] = unbroken
    return environment


def unbroken(text: str):
    """Return a text as HTML in which each number with its interval stays in one line."""
    import markupsafe

    escaped = str(markupsafe.escape(text))
    return markupsafe.Markup(
        INTERVAL.sub(lambda found: f'<span class="interval">{found[0]}</span>', escaped)
    )


def plural(count: int, noun: str) -> str:
    """'1 epoch', '2 epochs'."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def render(template: str, **values) -> str:
    """Render a template of `grpo/report/templates` into a whole document.

    Args:
      template: file name, for example "comparison.html".
      **values: what the template shows. In HTML text is escaped; `charts.chart` returns safe SVG.

    Raises:
      jinja2.UndefinedError: the template uses a value that was not given.
    """
    return _environment().get_template(template).render(values)

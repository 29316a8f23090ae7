"""The page around the report: HTML skeleton and CSS, in light and dark, wide and narrow."""

import html

# Drawn by matplotlib, then replaced by the CSS variable of the same name. No two may be equal.
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

CSS = """
:root { color-scheme: light dark; --back: #fcfcfa; --card: #f3f3ef; --text: #1c1c1a; --muted: #62625c; --grid: #dcdcd6;
  --heldout: #2368c4; --training: #cf6420;
  --s0: #2368c4; --s1: #1f9a8a; --s2: #e0a020; --s3: #cf6420; --s4: #8a5bc0; --s5: #7d7d76; }
@media (prefers-color-scheme: dark) { :root { --back: #171716; --card: #232321; --text: #ecece6; --muted: #a5a59c;
  --grid: #3b3b38; --heldout: #6aa8f5; --training: #f0935a;
  --s0: #6aa8f5; --s1: #45bfae; --s2: #e8b84a; --s3: #f0935a; --s4: #b18ae0; --s5: #96968e; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1rem 4rem; max-width: 56rem; background: var(--back); color: var(--text);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { margin: 0; font-size: 1rem; font-weight: 600; color: var(--muted); overflow-wrap: anywhere; }
h2 { margin: 2.8rem 0 .8rem; font-size: 1.25rem; }
.lead { margin: .4rem 0 .8rem; font-size: 1.5rem; line-height: 1.3; font-weight: 600; text-wrap: pretty; }
.note, figcaption { color: var(--muted); font-size: .875rem; margin: .5rem 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .6rem; margin-top: 1.2rem; }
.tile { background: var(--card); border-radius: .6rem; padding: .8rem 1rem; }
.tile b { display: block; font-size: 1.6rem; line-height: 1.2; }
.tile span { color: var(--muted); font-size: .8rem; line-height: 1.35; display: block; }
figure { margin: 0; }
svg { display: block; width: 100%; height: auto; font-family: inherit; }
.narrow { display: none; }
article { background: var(--card); border-radius: .6rem; padding: 1rem; margin: .8rem 0; }
article p { margin: 0; overflow-wrap: anywhere; }
.target { color: var(--muted); font-size: .875rem; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; margin-top: .7rem; }
.pair img, .pair video { display: block; max-width: 100%; height: auto; border-radius: .3rem; }
.tiny { image-rendering: pixelated; }
.pair figcaption { margin: .35rem 0 0; overflow-wrap: anywhere; }
.pair b { color: var(--text); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .35rem .9rem .35rem 0; border-bottom: 1px solid var(--grid); }
th { color: var(--muted); font-weight: 500; }
td { overflow-wrap: break-word; }
td:first-child { min-width: 9rem; }
.bar { display: flex; gap: 2px; height: 1.5rem; margin: .8rem 0; border-radius: .3rem; overflow: hidden; }
.bar i { display: block; }
.dot { display: inline-block; width: .7em; height: .7em; border-radius: .2em; margin-right: .5em; }
.s0 { background: var(--s0); } .s1 { background: var(--s1); } .s2 { background: var(--s2); }
.s3 { background: var(--s3); } .s4 { background: var(--s4); } .s5 { background: var(--s5); }
summary { cursor: pointer; color: var(--muted); }
pre { background: var(--card); border-radius: .6rem; padding: 1rem; overflow-x: auto; font-size: .85rem;
  white-space: pre-wrap; overflow-wrap: anywhere; }
@media (max-width: 34rem) { .wide { display: none; } .narrow { display: block; } .lead { font-size: 1.25rem; }
  body { padding-top: 1.2rem; } .tiles { grid-template-columns: 1fr 1fr; }
  .pair { grid-template-columns: 1fr; } }
"""


def page(title: str, heading: str, sections: list[tuple[str, str]]) -> str:
    """A whole HTML document. title: plain text; heading and the sections' (title, body): HTML."""
    body = "".join(
        f"<section>{f'<h2>{name}</h2>' if name else ''}{content}</section>\n"
        for name, content in sections
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>{CSS}</style>
</head>
<body>
<h1>{heading}</h1>
{body}</body>
</html>
"""


def table(head: list[str], rows: list[list[str]], escape: bool = True) -> str:
    """An HTML table of text; escape=False: the cells of `rows` are HTML."""
    clean = html.escape if escape else str
    body = "".join(
        "<tr>" + "".join(f"<td>{clean(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return (
        f'<div class="scroll"><table><thead><tr>{"".join(f"<th>{html.escape(h)}</th>" for h in head)}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )

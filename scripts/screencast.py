"""Records a command in a real terminal, and draws the recording as an animated SVG.

    python scripts/screencast.py record quickstart.cast bash scripts/quickstart.sh
    python scripts/screencast.py draw quickstart.cast docs/images/quickstart.svg "2 CPU cores"

The recording is asciinema's format, version 2: a line of JSON with the terminal's size and the
command, then one of [seconds, "o", text] for each output. Drawing knows lines and carriage returns,
which is what the commands of this project print; other control sequences are refused. Waiting is
shortened in the picture, and the clock in its title shows the seconds as recorded. Where animations
are switched off (`prefers-reduced-motion`) the picture shows the end.
"""

import html
import json
import os
import pathlib
import pty
import re
import shlex
import subprocess
import sys
import time

COLUMNS, ROWS = 110, 26  # of the terminal and of the picture
SHORTEST, LONGEST = 0.08, 0.9  # seconds of a frame; longer waiting is shortened
LAST = 6.0  # seconds that the last frame stays
CELL, LINE, FONT = 7.8, 18, 13  # width of a character, distance of lines, size of letters; pixels
MARGIN, TITLE = 14, 34


def record(path: pathlib.Path, command: list[str]) -> int:
    """Run the command in a terminal, write what it prints with the times, and return its exit code."""
    size = {"COLUMNS": str(COLUMNS), "LINES": str(ROWS), "TERM": "dumb"}
    terminal, inside = pty.openpty()
    process = subprocess.Popen(
        command, stdin=inside, stdout=inside, stderr=inside, env=os.environ | size
    )
    os.close(inside)
    start = time.monotonic()
    with path.open("w", encoding="utf-8") as file:
        head = {"version": 2, "width": COLUMNS, "height": ROWS, "command": shlex.join(command)}
        file.write(json.dumps(head) + "\n")
        while True:
            try:
                data = os.read(terminal, 1 << 16)
            except OSError:  # Linux's answer once the command has ended
                break
            if not data:
                break
            text = data.decode(errors="replace")
            file.write(json.dumps([round(time.monotonic() - start, 3), "o", text]) + "\n")
            file.flush()
            print(text, end="", flush=True)
    os.close(terminal)
    return process.wait()


def frames(path: pathlib.Path) -> tuple[str, list[tuple[float, list[str]]]]:
    """Return (command, [(seconds, lines of the screen so far)]) of a recording. Raises ValueError on
    control sequences.
    """
    head, *events = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    lines, found = [""], []
    for seconds, _, text in events:
        if match := re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f]", text):
            raise ValueError(f"{path}: {match[0]!r} at {seconds} s is not text")
        for part in re.split(r"(\r?\n|\r)", text.replace("\r\r\n", "\n").replace("\r\n", "\n")):
            if part == "\n":
                lines.append("")
            elif part == "\r":
                lines[-1] = ""
            else:
                lines[-1] += part
        found.append((seconds, [row for line in lines for row in wrapped(line)]))
    return head["command"], found


def wrapped(line: str) -> list[str]:
    """Return a line as the terminal shows it, broken at its width."""
    return [line[i : i + COLUMNS] for i in range(0, max(len(line), 1), COLUMNS)]


def draw(source: pathlib.Path, target: pathlib.Path, machine: str) -> None:
    """Write the picture of a recording: each row of text appears at its time and stays, the rows are
    moved up as the terminal scrolls, and the clock counts. machine: where it was recorded, for the
    picture's title.
    """
    command, recorded = frames(source)
    shown = [(0.0, [f"$ {command}"]), *((s, [f"$ {command}", *rows]) for s, rows in recorded)]
    times, at = [], 0.0
    for (seconds, _), (following, _) in zip(shown, [*shown[1:], (shown[-1][0] + LAST, [])]):
        times.append(at)
        at += min(max(following - seconds, SHORTEST), LONGEST)
    total = at - LONGEST + LAST

    spans: dict[tuple[int, str], list[float]] = {}  # (row, text): seconds of appearing and leaving
    for start, end, (_, rows) in zip(times, [*times[1:], total], shown):
        for row in enumerate(rows):
            spans.setdefault(row, [start, end])[1] = end
    clocks = [
        (start, end, f"{int(s) // 60}:{int(s) % 60:02}")
        for start, end, (s, _) in zip(times, [*times[1:], total], shown)
    ]
    tops = [max(len([*rows]) - (not rows[-1]) - ROWS, 0) for _, rows in shown]
    body = [
        _text(row, text, start, end, total) for (row, text), (start, end) in spans.items() if text
    ]
    scroll = "".join(
        f"{100 * start / total:.3f}%{{transform:translateY({-LINE * top}px)}}"
        for start, top, before in zip(times, tops, [None, *tops])
        if top != before
    )
    last = f"100%{{transform:translateY({-LINE * tops[-1]}px)}}"
    width, height = COLUMNS * CELL + 2 * MARGIN, ROWS * LINE + TITLE + MARGIN
    clock = "".join(_clock(text, start, end, total, width) for start, end, text in _joined(clocks))
    target.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" '
        f'width="{width:.0f}" height="{height}" font-family="ui-monospace,SFMono-Regular,Menlo,'
        f'Consolas,\'DejaVu Sans Mono\',monospace" font-size="{FONT}"><title>{html.escape(command)}'
        f"</title><style>text{{white-space:pre;fill:#d8dee4}}.p{{fill:#7ee787}}.c{{fill:#9aa4ae}}"
        f".a{{animation-duration:{total:.2f}s;animation-iteration-count:infinite;"
        f"animation-timing-function:step-end}}"
        f"@keyframes s{{{scroll}{last}}}#s{{animation-name:s;"
        f"transform:translateY({-LINE * tops[-1]}px)}}{_keyframes(spans, clocks, total)}"
        f"@media (prefers-reduced-motion:reduce){{.a{{animation:none}}.o{{display:none}}}}</style>"
        f'<rect width="100%" height="100%" rx="8" fill="#0f1419"/>'
        f'<path d="M0 {TITLE - 8}H{width:.0f}" stroke="#2b333b"/>'
        f'<text class="c" x="{MARGIN}" y="18">recorded on '
        f"{html.escape(machine)}; waiting is shortened, the clock is not</text>{clock}"
        f'<svg y="{TITLE}" width="{width:.0f}" height="{ROWS * LINE + 6}"><g id="s" class="a">'
        f"{''.join(body)}</g></svg></svg>\n",
        encoding="utf-8",
    )


def _joined(clocks: list[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    """Return the clock's texts with the times of equal neighbours joined."""
    joined: list[tuple[float, float, str]] = []
    for start, end, text in clocks:
        if joined and joined[-1][2] == text:
            joined[-1] = (joined[-1][0], end, text)
        else:
            joined.append((start, end, text))
    return joined


def _name(start: float, end: float) -> str:
    return f"k{start * 100:.0f}_{end * 100:.0f}"


def _keyframes(spans, clocks, total: float) -> str:
    """Return the CSS of every interval in which something is visible."""
    intervals = {(s, e) for s, e in spans.values()} | {(s, e) for s, e, _ in _joined(clocks)}
    rules = []
    for start, end in sorted(intervals):
        off = "" if end >= total else f"{100 * end / total:.3f}%{{opacity:0}}"
        on = f"{100 * start / total:.3f}%{{opacity:1}}"
        name = _name(start, end)
        rules.append(f"@keyframes {name}{{{'0%{opacity:0}' * (start > 0)}{on}{off}}}")
        rules.append(f".{name}{{animation-name:{name}}}")
    return "".join(rules)


def _text(row: int, text: str, start: float, end: float, total: float) -> str:
    """Return a row of the terminal, visible from start to end."""
    kind = "p" if row == 0 or text.startswith("==") else ""
    gone = " o" * (end < total)
    return (
        f'<text class="a {_name(start, end)} {kind}{gone}" x="{MARGIN}" y="{LINE * row + FONT}">'
        f"{html.escape(text, quote=False)}</text>"
    )


def _clock(text: str, start: float, end: float, total: float, width: float) -> str:
    """Return the clock as it is from start to end."""
    gone = " o" * (end < total)
    return (
        f'<text class="a {_name(start, end)} c{gone}" x="{width - MARGIN:.0f}" y="18" '
        f'text-anchor="end">{text}</text>'
    )


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["record", path, *command] if command:
            sys.exit(record(pathlib.Path(path), command))
        case ["draw", source, target, machine]:
            draw(pathlib.Path(source), pathlib.Path(target), machine)
        case _:
            sys.exit(__doc__)

"""scripts/screencast.py: a recording of a terminal, and its picture."""

import json
import re
import sys
import xml.etree.ElementTree as ET

import pytest

from tests.docs.test_pages import script

screencast = script("scripts/screencast.py")
SVG = "{http://www.w3.org/2000/svg}"


def write(path, *events, command="do it"):
    head = {"version": 2, "width": 110, "height": 26, "command": command}
    path.write_text("".join(json.dumps(line) + "\n" for line in (head, *events)))
    return path


def test_a_recording_is_what_the_command_printed(tmp_path):
    path = tmp_path / "a.cast"
    code = "import time; print('one', flush=True); time.sleep(0.2); print('two <&>'); exit(3)"
    assert screencast.record(path, [sys.executable, "-c", code]) == 3
    _, found = screencast.frames(path)
    assert found[-1][1] == ["one", "two <&>", ""]
    times = [seconds for seconds, _ in found]
    assert times == sorted(times) and times[-1] > 0.2


def test_a_carriage_return_replaces_the_line_and_long_lines_are_broken(tmp_path):
    long = "x" * (screencast.COLUMNS + 5)
    path = write(tmp_path / "a.cast", [0.1, "o", "10 %\r20 %\r\n"], [0.2, "o", long])
    _, found = screencast.frames(path)
    assert found[-1][1] == ["20 %", "x" * screencast.COLUMNS, "xxxxx"]
    with pytest.raises(ValueError, match=r"x1b.* 0\.5 s"):
        screencast.frames(write(path, [0.5, "o", "\x1b[1m"]))


def test_rows_appear_in_their_order_and_the_clock_is_that_of_the_recording(tmp_path):
    lines = [[float(60 * i), "o", f"line {i}\r\n"] for i in range(40)]
    source = write(tmp_path / "a.cast", *lines)
    screencast.draw(source, tmp_path / "a.svg", "2 cores & more")
    text = (tmp_path / "a.svg").read_text()
    picture = ET.fromstring(text)
    style = picture.findtext(f"{SVG}style") or ""
    rows = picture.findall(f".//{SVG}g/{SVG}text")
    assert [row.text for row in rows] == ["$ do it", *(f"line {i}" for i in range(40))]
    starts = [int(re.search(r"k(\d+)_", row.get("class") or "")[1]) for row in rows]
    assert starts == sorted(starts) and len(set(starts)) == 41
    assert "2 cores & more" in (picture.findtext(f"{SVG}text") or "")
    clocks = [row.text for row in picture.findall(f"{SVG}text")]
    assert clocks[-1] == "39:00"  # seconds as recorded, though
    total = float(re.search(r"animation-duration:([\d.]+)s", style)[1])
    assert total < 40 * screencast.LONGEST + screencast.LAST + 1
    moved = [int(y) for y in re.findall(r"translateY\((-?\d+)px\)", style)]
    assert min(moved) == -screencast.LINE * (41 - screencast.ROWS)

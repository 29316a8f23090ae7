"""The pages of docs name settings, flags and figures as they are."""

import importlib.util
import pathlib
import re

import pytest

from grpo.settings.schema import SETTINGS
from tests.commands import ROOT
from wan_jax.command_line import flag_source

SECTIONS = {key.partition(".")[0] for key in SETTINGS if "." in key}
CODE = re.compile(r"`([^`\n]+)`")
ASSIGNED = re.compile(
    rf"(?:--)?(?:config\.|c\.)?((?:{'|'.join(SECTIONS)})(?:\.[a-z_0-9]+)+)(?:=([^,;]*))?[,;]?"
)
LINK = re.compile(r"\]\(([\w./-]+)[#\w-]*\)")  # to a file
FILE = re.compile(r"\.(py|txt|jsonl?|log|md|png)$")
OF_REWARDS = re.compile(r"reward\.weights\.\w+")  # a reward of the user's own has a weight, too
PAGES = [
    ROOT / "README.md",
    *(p for p in (ROOT / "docs").rglob("*.md") if "_build" not in p.parts),
]
THEIRS = {"train.cfg"}  # a setting of Flow-GRPO, in a remark
OF_OTHERS = ("results_archive.md", "changelog.md")  # names of their time


def script(name: str):
    """Import a file of scripts/ or docs/, which are no packages."""
    spec = importlib.util.spec_from_file_location(pathlib.Path(name).stem, ROOT / name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ours(text: str) -> str:
    """Return a page without the first column of tables about other projects."""
    return re.sub(r"^\| [^|]+\|", "|", text, flags=re.MULTILINE)


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_settings_that_a_page_names_exist(path):
    text = path.read_text(encoding="utf-8")
    if "coming_from" in path.parts:
        text = ours(text)
    elif path.name == "README.md":  # its rows about other projects
        text = re.sub(r"^\| (Flow-GRPO|Diffusers|FastVideo) \|.*$", "", text, flags=re.MULTILINE)
    elif path.name in OF_OTHERS:
        return
    known = {
        key[:i] for key in SETTINGS for i in range(len(key) + 1) if key[i : i + 1] in ("", ".")
    }
    named = settings_in(text)
    unknown = {n for n, _ in named if n not in known and not OF_REWARDS.match(n)}
    assert unknown - THEIRS == set()
    for name, value in named:
        choices = SETTINGS[name].choices if name in SETTINGS else ()
        if choices and re.fullmatch(r"\w+", value):
            assert value in choices, f"{name}={value}"


def settings_in(text: str):
    """Return the (setting, value) pairs in the code spans of a page; '' where it has no value."""
    words = (word for span in CODE.findall(text) for word in span.split())
    found = (match for word in words if (match := ASSIGNED.fullmatch(word)))
    return [(m[1], m[2] or "") for m in found if not FILE.search(m[1])]


def test_a_misspelt_setting_is_found():
    page = "`train.kl_wieght=1 sample.sde=cps`, `--config.lora.rank` in `train.py`, not `model`"
    assert settings_in(page) == [("train.kl_wieght", "1"), ("sample.sde", "cps"), ("lora.rank", "")]
    assert "train.kl_wieght" not in SETTINGS


def test_links_between_pages_work_in_the_repository_without_the_site():
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    of_site = {ROOT / line for line in ignored if line.endswith(".md")}
    assert of_site
    broken = [
        (page.name, link)
        for page in {*PAGES, ROOT / "CONTRIBUTING.md"} - of_site
        for link in LINK.findall(page.read_text(encoding="utf-8"))
        if (path := (page.parent / link).resolve()) in of_site or not path.exists()
    ]
    assert broken == []


@pytest.mark.parametrize("name", ["diffusers", "fastvideo"])
def test_flags_for_those_who_come_from_elsewhere_exist(name):
    text = ours((ROOT / f"docs/coming_from/{name}.md").read_text(encoding="utf-8"))
    known: set[str] = set()
    for module in ("wan_jax.sample", "convert.from_diffusers", "convert.export_lora"):
        source = flag_source.read(module)
        assert source is not None
        known |= {*source.names}
    flags = set(re.findall(r"`--(\w+)", text))
    assert len(flags) > 5 and flags <= known


@pytest.mark.slow
def test_hours_and_memory_are_those_of_the_plan():
    """All of the memory needs minutes of compilation; the hours follow from the jaxprs."""
    page = script("scripts/memory_page.py")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in page.PAGE.read_text(encoding="utf-8").splitlines()
        if line.startswith("| Wan")
    ]
    assert len(rows) == len(page.MODELS) * len(page.KINDS)
    cases = [
        ("h200", ["Wan 2.1 1.3B", "H200", "bf16", "9", "kept"], "save_matmuls", "dtype"),
        ("l40s", ["Wan 2.1 14B", "L40S", "fp8", "3", "recomputed"], "block", "fp8"),
    ]
    for kind, first, *how in cases:
        (hours,) = (row[6:] for row in rows if row[:5] == first)
        found = [page.hours_of(first[0], method, *how, kind) for method in page.METHODS]
        assert [f"{hour:.0f}" for hour in found] == hours
    # as compiled on this CPU: another one may need other temporaries
    first = ["Wan 2.1 1.3B", "RTX 4090", "bf16", "9", "recomputed"]
    (memory,) = (row[5] for row in rows if row[:5] == first)
    needed, limit = map(float, memory.split(" of "))
    found = page.peak_of(first[0], "grpo", 9, "block", "dtype", int(limit * 2**30))
    assert found / 2**30 == pytest.approx(needed, rel=0.2)


def test_a_command_is_a_table_of_its_flags():
    page = script("docs/generated.py")
    text = "Does *x*.\n\n    run --it=<file>\n\n" + page.FLAGS + "  --it       file, e.g.\n"
    text += "             a_b [x]\n  --[no]grid one\n\n-h: this page"
    head, rows = page.command(text).split("|---|---|\n")
    assert head.startswith("Does \\*x\\*.\n\n    run --it=<file>\n")
    assert rows.splitlines() == ["| `--it` | file, e.g. a\\_b \\[x\\] |", "| `--[no]grid` | one |"]


def test_counts_of_a_module():
    counts = script("scripts/count_code.py")
    lines = ['"""A module.', "", 'Of two."""', "", "# why", "def f(self, a, *rest, b=1):  # what"]
    lines += [
        '    """Does it."""',
        "    return '''a",
        "",
        "b'''",
        "",
        "class C:",
        "    x = (",
        "",
        "    )",
    ]
    text = "\n".join([*lines, ""])
    assert (
        counts.code_lines(text) == 7
    )  # def, return and its text, class, and x but for an empty line
    assert counts.parameters(text) == [(2, "f")]

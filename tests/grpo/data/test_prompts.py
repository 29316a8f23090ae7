"""Prompt files: text and JSON lines, and what is wrong with them."""

import json

import numpy as np
import pytest

from grpo.compare import read_methods
from grpo.data.prompts import epoch_prompts, examples, load_prompts, without_shared
from rewards.ocr.targets import parse_targets
from wan_jax.command_line.cli import UserError


def write(path, *lines):
    path.write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines),
        encoding="utf-8",
    )
    return path


def test_text_and_json_lines_give_the_same_set(tmp_path):
    text = write(
        tmp_path / "a.txt", "# signs", 'A sign "ÖPEN"', "", 'Two: "A" and "B"', 'A sign "ÖPEN"'
    )
    lines = write(
        tmp_path / "a.jsonl",
        {"prompt": 'A sign "ÖPEN"', "id": 7},
        "",
        {"prompt": 'Two: "A" and "B"'},
        {"prompt": 'A sign "ÖPEN"', "id": 8},
    )
    first, second = load_prompts(text, parse_targets), load_prompts(lines, parse_targets)
    assert first.prompts == second.prompts == ('A sign "ÖPEN"', 'Two: "A" and "B"')
    assert first.targets == second.targets == (("ÖPEN",), ("A", "B"))
    assert second.metadata == ({"id": 7}, {}) and first.metadata == ({}, {})
    assert load_prompts(lines, parse_targets, limit=1).prompts == first.prompts[:1]


def test_targets_may_be_given_where_the_prompt_has_no_quotes(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        {"prompt": "A neon sign that says open", "targets": ["open"], "camera": "pan"},
    )
    found = load_prompts(path, parse_targets)
    assert found.targets == (("open",),) and found.metadata == ({"camera": "pan"},)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "x', "line 2: not JSON"),
        ({"text": "x"}, 'line 2: no "prompt"'),
        ([1], 'line 2: no "prompt"'),
        ({"prompt": " "}, 'no "prompt"'),
        ({"prompt": "x", "targets": "open"}, "'open'"),
        ({"prompt": "x", "targets": [""]}, "not blank"),
        ({"prompt": "no quotes"}, "no quoted text"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    path = write(tmp_path / "a.jsonl", {"prompt": '"fine"'}, line)
    with pytest.raises(UserError, match="1 of 2 lines") as error:
        load_prompts(path, parse_targets)
    assert message in str(error.value)


def test_many_bad_lines_are_counted(tmp_path):
    with pytest.raises(UserError, match=r"8 of 8 lines cannot be scored.*\n(.*\n){5}  and 3 more"):
        load_prompts(write(tmp_path / "a.txt", *(f"nothing {i}" for i in range(8))), parse_targets)


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.ndjson", "a.Ndjson"])
def test_json_lines_by_suffix(tmp_path, name):
    """Also with U+2028 in a text, at which `str.splitlines` would split."""
    path = write(
        tmp_path / name, {"prompt": 'A "OPEN"'}, '{"prompt": "B \\"SHUT\\"", "note": "x\u2028y"}'
    )
    found = load_prompts(path, parse_targets)
    assert found.targets == (("OPEN",), ("SHUT",)) and found.metadata == ({}, {"note": "x\u2028y"})


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        *(
            (f"a{suffix}", '"A ""OPEN"" sign",OPEN', f"{suffix.lower()} files are not read")
            for suffix in (".json", ".csv", ".TSV", ".parquet")
        ),
        ("a.txt", '{"prompt": "A sign that says \\"OPEN\\"."}\nA "B"', "holds JSON"),
        ("a", '[{"prompt": "x"}]', "holds JSON"),
        ("a.txt", '\n[\n{"prompt": "A \\"B\\""}\n]', "holds JSON"),
    ],
)
def test_files_that_would_be_misread_are_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message) as error:
        load_prompts(tmp_path / name, parse_targets)
    assert ".jsonl or .ndjson" in str(error.value) and str(tmp_path / name) in str(error.value)


def test_a_prompt_in_brackets_is_text(tmp_path):
    assert (
        len(load_prompts(write(tmp_path / "a.txt", '[cinematic] A sign "OPEN"'), parse_targets))
        == 1
    )


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b'\xef\xbb\xbf# signs\r\nA "OPEN"\r\n')
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "A \\"OPEN\\""}')
    (tmp_path / "c.txt").write_bytes(b"\xef\xbb\xbfmine: recipe.py\n")
    assert load_prompts(tmp_path / "a.txt", parse_targets).prompts == ('A "OPEN"',)
    assert load_prompts(tmp_path / "b.jsonl", parse_targets).prompts == ('A "OPEN"',)
    assert [m.name for m in read_methods([], [], tmp_path / "c.txt")] == ["mine"]


def test_another_encoding_is_an_error(tmp_path):
    for encoding in ("utf-16", "latin-1"):
        (tmp_path / "a.txt").write_bytes('A sign "CAFÉ"'.encode(encoding))
        with pytest.raises(UserError, match=r"a\.txt is not UTF-8 text \(.*\); save it as UTF-8$"):
            load_prompts(tmp_path / "a.txt", parse_targets)
        with pytest.raises(UserError, match=r"a\.txt is not UTF-8 text"):
            read_methods([], [], tmp_path / "a.txt")


def test_targets_are_cleaned_like_prompts(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        {"prompt": 'A "R&amp;D" sign'},
        {"prompt": "x", "targets": ["R&amp;D", "O\u200bK "]},
    )
    assert load_prompts(path, parse_targets).targets == (("R&D",), ("R&D", "OK"))
    with pytest.raises(UserError, match='line 1: "targets" has a text without'):
        load_prompts(
            write(tmp_path / "a.jsonl", {"prompt": "x", "targets": ["\u200b"]}), parse_targets
        )
    with pytest.raises(UserError, match="line 2: a backslash before the quote"):
        load_prompts(write(tmp_path / "a.txt", 'A "B"', r"A \"B\""), parse_targets)


def test_lines_that_cannot_be_scored_are_left_out_on_demand(tmp_path):
    path = write(tmp_path / "a.txt", 'A "B"', "nothing", 'A 12" sign', 'A "C"')
    found = load_prompts(path, parse_targets, skip_invalid=True)
    assert found.prompts == ('A "B"', 'A "C"') and found.targets == (("B",), ("C",))
    assert [line.split(":")[0].strip() for line in found.left_out] == ["line 2", "line 3"]
    with pytest.raises(UserError, match="2 of 4 lines") as error:
        load_prompts(path, parse_targets)
    assert "prompts.skip_invalid" in str(error.value)
    with pytest.raises(UserError, match="holds no prompt"):
        load_prompts(write(tmp_path / "b.txt", "nothing"), parse_targets, skip_invalid=True)

    def check(targets):
        if targets == ("B",):
            raise ValueError("unreadable")

    kept = load_prompts(path, parse_targets, check=check, skip_invalid=True)
    assert kept.prompts == ('A "C"',) and len(kept.left_out) == 3


def test_held_out_prompts_are_not_trained(tmp_path):
    """As cleaned: curly and straight apostrophes are alike."""
    train = load_prompts(
        write(tmp_path / "a.txt", 'Joe’s "A"', 'B "B"', 'C "C"'),
        parse_targets,
    )
    heldout = load_prompts(write(tmp_path / "b.txt", 'Joe\'s "A"', 'D "D"'), parse_targets)
    apart = without_shared(train, heldout, skip_invalid=True)
    assert apart.prompts == ('B "B"', 'C "C"') and apart.targets == (("B",), ("C",))
    assert len(apart.metadata) == 2 and len(apart.left_out) == 1
    with pytest.raises(UserError, match=r"^1 held-out prompts") as error:
        without_shared(train, heldout, skip_invalid=False)
    assert "prompts.skip_invalid" in str(error.value)
    assert without_shared(apart, heldout, skip_invalid=False).prompts == apart.prompts


def test_examples_show_prompts_and_targets(tmp_path):
    found = load_prompts(
        write(tmp_path / "a.txt", 'A "B" and "C"', 'A "D"', 'A "E"'), parse_targets
    )
    assert examples(found) == ["prompt: A \"B\" and \"C\" -> 'B', 'C'", "prompt: A \"D\" -> 'D'"]


def test_every_prompt_is_used_equally_often():
    seen = np.bincount(
        np.concatenate([epoch_prompts(3, epoch, 10, 3) for epoch in range(9)]), minlength=10
    )
    assert seen.max() - seen.min() <= 3 and seen.sum() == 27
    assert len(set(epoch_prompts(3, 5, 10, 10))) == 10
    with pytest.raises(UserError, match=r"sample\.groups=11"):
        epoch_prompts(3, 0, 10, 11)

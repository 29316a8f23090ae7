"""Prompt files: text and JSON lines, and what is wrong with them."""

import json

import numpy as np
import pytest

from grpo.prompts import epoch_prompts, load_prompts
from rewards.targets import parse_targets
from wan_jax.cli import UserError


def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def test_text_and_json_lines_give_the_same_set(tmp_path):
    text = write(tmp_path / "a.txt", "# signs", 'A sign "ÖPEN"', "", 'Two: "A" and "B"', 'A sign "ÖPEN"')
    lines = write(tmp_path / "a.jsonl", {"prompt": 'A sign "ÖPEN"', "id": 7}, "", {"prompt": 'Two: "A" and "B"'},
                  {"prompt": 'A sign "ÖPEN"', "id": 8})
    first, second = load_prompts(text, parse_targets), load_prompts(lines, parse_targets)
    assert first.prompts == second.prompts == ('A sign "ÖPEN"', 'Two: "A" and "B"')
    assert first.targets == second.targets == (("ÖPEN",), ("A", "B"))
    assert second.metadata == ({"id": 7}, {}) and first.metadata == ({}, {})
    assert load_prompts(lines, parse_targets, limit=1).prompts == first.prompts[:1]


def test_targets_may_be_given_where_the_prompt_has_no_quotes(tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": "A neon sign that says open", "targets": ["open"], "camera": "pan"})
    found = load_prompts(path, parse_targets)
    assert found.targets == (("open",),) and found.metadata == ({"camera": "pan"},)


@pytest.mark.parametrize(("line", "message"), [
    ('{"prompt": "x', "line 2: not JSON"), ({"text": "x"}, 'line 2: no "prompt"'), ([1], 'line 2: no "prompt"'),
    ({"prompt": " "}, 'no "prompt"'), ({"prompt": "x", "targets": "open"}, "'open'"),
    ({"prompt": "x", "targets": [""]}, "not blank"), ({"prompt": "no quotes"}, "no quoted text"),
])
def test_bad_lines_are_named(tmp_path, line, message):
    path = write(tmp_path / "a.jsonl", {"prompt": '"fine"'}, line)
    with pytest.raises(UserError, match="1 of 2 lines") as error:
        load_prompts(path, parse_targets)
    assert message in str(error.value)


def test_many_bad_lines_are_counted(tmp_path):
    with pytest.raises(UserError, match=r"8 of 8 lines cannot be scored.*\n(.*\n){5}  and 3 more"):
        load_prompts(write(tmp_path / "a.txt", *(f"nothing {i}" for i in range(8))), parse_targets)


def test_every_prompt_comes_up_equally_often():
    seen = np.bincount(np.concatenate([epoch_prompts(3, epoch, 10, 3) for epoch in range(9)]), minlength=10)
    assert seen.max() - seen.min() <= 3 and seen.sum() == 27
    assert len(set(epoch_prompts(3, 5, 10, 10))) == 10
    with pytest.raises(UserError, match=r"sample\.groups=11"):
        epoch_prompts(3, 0, 10, 11)

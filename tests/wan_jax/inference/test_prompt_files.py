"""Files of prompts; `tests/grpo/data/test_prompts.py` has what training adds."""

import pytest

from wan_jax.errors import UserError
from wan_jax.inference.prompt_files import read_prompts


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.txt", "\ufeff# signs\n a red sign \n\nsea\na red sign\n"),
        ("a.jsonl", '{"prompt": " a red sign", "targets": ["x"]}\n\n{"prompt": "sea", "id": 3}\n'),
    ],
)
def test_prompts_are_read_once_and_in_order(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    assert read_prompts(path) == ("a red sign", "sea")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", "# none\n", "holds no prompt"),
        ("a.txt", '{"prompt": "x"}\n', "holds JSON"),
        ("a.csv", "x\n", ".csv"),
        ("a.jsonl", '{"prompt": "x"}\n{"text": "y"}\n', "line 2"),
        ("a.jsonl", '{"prompt": "x"\n', "line 1"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_message(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(UserError, match=message) as raised:
        read_prompts(path)
    assert str(path) in str(raised.value)


def test_a_missing_file_names_the_folder_where_it_was_sought(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"train\.txt") as raised:
        read_prompts("train.txt")
    assert str(tmp_path) in str(raised.value)

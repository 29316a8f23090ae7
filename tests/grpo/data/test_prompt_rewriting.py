"""Rewriting by a chat model behind a small endpoint: the texts to be written never change."""

import json

import pytest

from grpo.data.prompt_rewriting import INSTRUCTION, problem, rewrite
from grpo.data.prompts import PromptSet, load_prompts
from grpo.make_prompts import rewrite_file
from rewards.ocr.targets import parse_targets
from tests.rewards.serving import scripted
from wan_jax.errors import UserError

PROMPTS = {
    'a mug with "Tea" on its side': 'On a table of oak, a mug with "Tea"\non its side steams.',
    'a sign "ONE" and a sign "TWO"': "Two signs, “TWO” and “ONE”, in the rain.",
    'a flag with "Go!" on it': "A flag flutters over the harbour.",
    'a cake with "42" in icing': "",
    'a box stamped "Fragile"': "A dusty box, stamped “Fragile”, stands in a sunlit attic.",
}


@pytest.fixture
def source(tmp_path):
    lines = [json.dumps({"prompt": prompt, "surface": "s"}) for prompt in PROMPTS]
    (tmp_path / "some.jsonl").write_text("\n".join(lines))
    return tmp_path / "some.jsonl"


@pytest.fixture
def chat():
    """(URL, list of the tokens and questions)."""
    asked = []

    def answer(method, path, headers, body):
        if path == "/v1/models":
            return 200, {"data": [{"id": "a-model"}]}
        request = json.loads(body)
        (part,) = request["messages"][0]["content"]
        asked.append((headers["Authorization"], part["text"]))
        text = PROMPTS[part["text"].removeprefix(INSTRUCTION)]
        return 200, {"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}

    with scripted(answer) as url:
        yield url, asked


def test_only_rewrites_with_the_same_texts_are_taken(source, chat, tmp_path, capsys):
    url, asked = chat
    rewrite_file(str(source), tmp_path / "out", url, "", "secret")
    out = capsys.readouterr().out
    assert "2 of 5 prompts rewritten, 5 requests" in out and "secret" not in out
    for reason in ("other quoted texts", "no quoted text, or an unpaired quote", "empty"):
        assert f"1 rewrites refused, the original stays: {reason}" in out
    assert {token for token, _ in asked} == {"Bearer secret"} and len(asked) == 5
    old, new = (load_prompts(p, parse_targets) for p in (source, tmp_path / "out" / "some.jsonl"))
    assert new.targets == old.targets and new.prompts[1:4] == old.prompts[1:4]
    assert new.prompts[0] == 'On a table of oak, a mug with "Tea" on its side steams.'
    assert new.metadata[0] == {"surface": "s", "original": old.prompts[0]}
    assert load_prompts(tmp_path / "out" / "some.txt", parse_targets).prompts == new.prompts
    # the answers are stored: the same files without a request
    first = (tmp_path / "out" / "some.jsonl").read_bytes()
    rewrite_file(str(source), tmp_path / "out", url, "a-model", "secret")
    assert len(asked) == 5 and (tmp_path / "out" / "some.jsonl").read_bytes() == first


def test_two_prompts_do_not_become_one(tmp_path):
    """A file reads equal prompts once, so the second one would be lost."""
    old = ('a mug with "Tea" on it', 'a cup with "Tea" on it')
    found = rewrite(
        PromptSet(old, (("Tea",), ("Tea",))),
        lambda question: 'A cup that says "Tea" steams.',
        "a-model",
        tmp_path / "answers",
        lambda answers, total: answers,
    )
    assert found.prompts == ('A cup that says "Tea" steams.', old[1])
    assert found.refused == {"the same as another prompt": 1}


def test_an_unknown_model_names_the_flag(source, chat, tmp_path):
    with pytest.raises(UserError, match=r"--rewrite=.* serves a-model, not 'other'.* --model"):
        rewrite_file(str(source), tmp_path / "out", chat[0], "other", "")


@pytest.mark.parametrize(
    "answer, reason",
    [
        ('A "b" c.', ""),
        ("A “b” c.", ""),
        ('A "B" c.', "other quoted texts"),
        ('A "b" and "b".', "other quoted texts"),
        ('A "b c.', "no quoted text, or an unpaired quote"),
        ("", "empty"),
    ],
)
def test_what_is_refused(answer, reason):
    assert problem(answer, ("b",)) == reason

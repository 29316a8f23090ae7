"""Generated prompts are what was asked for, can be scored, and share no word between training and
held-out.
"""

import re
import subprocess
import sys

import pytest

from grpo import make_prompts
from grpo.data import vocabulary
from grpo.data.prompts import load_prompts
from grpo.make_prompts import TextStyle, make, words_of
from rewards.ocr.targets import parse_targets
from wan_jax.command_line.cli import UserError


def test_word_lists():
    assert len(set(vocabulary.WORDS)) == len(vocabulary.WORDS) > 700
    assert all(re.fullmatch("[a-z]{2,12}", word) for word in vocabulary.WORDS)
    assert all(surface.count("{text}") == 1 for surface in vocabulary.SURFACES.values())
    for names in (vocabulary.SURFACES, vocabulary.SCENES, vocabulary.CAMERAS):
        assert len(set(names.values())) == len(names) and all(
            text.isascii() and '"' not in text for text in names.values()
        )


@pytest.mark.parametrize(
    "style",
    [
        TextStyle(),
        TextStyle((1, 1), (3, 8), ("upper",), 0.0, 0.0),
        TextStyle((2, 3), (6, 12), ("title",), 1.0, 1.0),
        TextStyle(cases=("lower",), numbers=0.0, punctuation=0.0, random=1.0),
    ],
    ids=["default", "word", "signs", "random"],
)
def test_texts_are_as_asked(style):
    made = make(300, 60, 5, style)
    assert not words_of(made["train"]) & words_of(made["heldout"])
    for line in [*made["train"], *made["heldout"]]:
        text, prompt = line["text"], line["prompt"]
        assert parse_targets(prompt) == (text,) == tuple(line["targets"]) and prompt.isascii()
        assert style.characters[0] <= len(text.replace(" ", "")) <= style.characters[1]
        assert style.words[0] <= len(re.findall("[A-Za-z]+", text)) <= style.words[1]
        assert any(change(text) == text for change in map(make_prompts.CASES.get, style.cases))
        assert style.numbers or not re.search(r"\d", text)
        assert style.numbers < 1 or re.search(r"\d", text)
        assert (
            bool(re.search("[!?&-]", text)) == style.punctuation
            if style.punctuation in (0, 1)
            else True
        )
        for part, names in (
            ("surface", vocabulary.SURFACES),
            ("scene", vocabulary.SCENES),
            ("light", vocabulary.LIGHTS),
            ("camera", vocabulary.CAMERAS),
        ):
            for piece in names[line[part]].split("{text}"):
                assert piece[1:] in prompt
    assert len({line["prompt"] for line in made["train"]}) == 300
    dictionary = words_of(made["train"]) & set(vocabulary.WORDS)
    assert not dictionary if style.random else len(dictionary) > 100


def test_a_seed_is_one_pair_of_sets():
    style = TextStyle()
    one = make(40, 10, 1, style)
    assert make(60, 12, 1, style)["train"][:40] == one["train"] and make(40, 10, 1, style) == one
    assert make(40, 10, 2, style)["train"] != one["train"]


def test_what_cannot_be_met_is_an_error():
    for style, message in (
        (dict(words=(3, 2)), "--words=3,2"),
        (dict(characters=(0, 4)), "--characters=0,4"),
        (dict(cases=("camel",)), "choose from upper"),
        (dict(numbers=1.5), "--numbers=1.5"),
        (dict(words=(1,)), "--words=1: "),
    ):
        with pytest.raises(UserError, match=message):
            TextStyle(**style)
    with pytest.raises(UserError, match="change --characters or --words"):
        make(5, 5, 0, TextStyle(words=(4, 4), characters=(1, 5)))


def test_command(tmp_path):
    command = [
        sys.executable,
        "-m",
        "grpo.make_prompts",
        "--count=50",
        "--heldout=20",
        f"--out={tmp_path / 'p'}",
    ]
    done = subprocess.run([*command, "--characters=4,9"], capture_output=True, text=True)
    assert done.returncode == 0 and "50 prompts" in done.stdout, done.stderr
    train, heldout = (
        load_prompts(tmp_path / "p" / name, parse_targets)
        for name in ("train.jsonl", "heldout.txt")
    )
    assert (
        len(train) == 50
        and len(heldout) == 20
        and set(train.metadata[0]) == {"text", "surface", "scene", "light", "camera"}
    )
    assert train.prompts == load_prompts(tmp_path / "p" / "train.txt", parse_targets).prompts
    done = subprocess.run([*command, "--characters=4,x"], capture_output=True, text=True)
    assert (
        done.returncode == 1
        and "--characters=4,x" in done.stderr
        and "Traceback" not in done.stderr
    )

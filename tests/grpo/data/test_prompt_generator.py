"""Generated prompts: as the style asks, readable by the reward, no word in both sets."""

import dataclasses
import re
from collections import Counter

import numpy as np
import pytest

from grpo.data import vocabulary
from grpo.data.prompt_generator import CASES, DEFAULT, TextStyle, draw_prompts, generate, words_of
from rewards.ocr.targets import parse_targets
from wan_jax.errors import UserError


@pytest.mark.quick_cases(1)
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
    made = generate(300, 60, 5, style)
    assert not words_of(made["train"]) & words_of(made["heldout"])
    for line in [*made["train"], *made["heldout"]]:
        text, prompt = line["text"], line["prompt"]
        assert parse_targets(prompt) == (text,) == tuple(line["targets"]) and prompt.isascii()
        assert style.characters[0] <= len(text.replace(" ", "")) <= style.characters[1]
        assert style.words[0] <= len(re.findall("[A-Za-z]+", text)) <= style.words[1]
        assert any(change(text) == text for change in map(CASES.get, style.cases))
        assert style.numbers or not re.search(r"\d", text)
        assert style.numbers < 1 or re.search(r"\d", text)
        if style.punctuation in (0, 1):
            assert bool(re.search("[!?&-]", text)) == style.punctuation
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


def test_a_seed_determines_both_sets():
    style = TextStyle()
    one = generate(40, 10, 1, style)
    assert (
        generate(60, 12, 1, style)["train"][:40] == one["train"]
        and generate(40, 10, 1, style) == one
    )
    assert generate(40, 10, 2, style)["train"] != one["train"]


def test_impossible_styles_are_errors():
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
        generate(5, 5, 0, TextStyle(words=(4, 4), characters=(1, 5)))


def test_another_vocabulary():
    """Phrases without a light or a camera leave no space; shares choose the number of words."""
    parts = dataclasses.replace(
        DEFAULT,
        words=("one", "two", "six"),
        surfaces={"s": "a sign {text}"},
        scenes={"h": "here"},
        lights={"": ""},
        cameras={"": ""},
    )
    style = TextStyle((1, 3), (1, 99), ("lower",), 0.0, 0.0, word_shares=(0.0, 0.0, 1.0))
    lines = draw_prompts(np.random.default_rng(0), 6, parts, style, endings="")
    assert {line["prompt"] for line in lines} == {
        f'A sign "{line["text"]}", here.' for line in lines
    }
    assert {tuple(sorted(line["text"].split())) for line in lines} == {("one", "six", "two")}
    style = TextStyle((1, 2), (1, 99), word_shares=(0.25, 0.75))
    lines = draw_prompts(np.random.default_rng(0), 400, DEFAULT, style, endings="")
    counts = Counter(len(re.findall("[A-Za-z]+", line["text"])) for line in lines)
    assert counts[2] / 400 == pytest.approx(0.75, abs=0.1)

"""Prompts in several styles: as people write them, readable, no word of a text held out and trained."""

import pytest

from grpo.data import chinese_vocabulary as chinese
from grpo.data.prompt_generator import TextStyle, words_of
from grpo.data.prompt_styles import STYLES, generate_styles
from grpo.make_prompts import check_readable, write
from rewards.ocr.targets import parse_targets
from wan_jax.errors import UserError

NAMES = tuple(STYLES)


@pytest.fixture(scope="module")
def sets():
    return generate_styles(500, 60, 5, TextStyle(random=0.2), NAMES)


def test_every_prompt_parses_to_its_targets_and_can_be_read(sets):
    assert [len(lines) for lines in sets.values()] == [500, *[60] * 6]
    for lines in sets.values():
        assert len({line["prompt"] for line in lines}) == len(lines)
        for line in lines:
            assert parse_targets(line["prompt"]) == tuple(line["targets"])
            assert len(line["targets"]) == 1 + (line["style"] == "two_texts")
            assert line["prompt"].isascii() == (line["style"] != "chinese")
    check_readable(sets, "rapidocr")


def test_no_word_is_held_out_and_trained(sets):
    trained = sets.pop("train")
    heldout = [line for lines in sets.values() for line in lines]
    assert words_of(trained) and words_of(heldout) and not words_of(trained) & words_of(heldout)
    ours, theirs = (
        {
            w
            for line in lines
            if line["style"] == "chinese"
            for w in chinese.WORDS
            if w in line["text"]
        }
        for lines in (trained, heldout)
    )
    assert len(ours) > 80 and len(theirs) > 20 and not ours & theirs
    sets["train"] = trained


def test_styles_take_turns_and_have_their_own_held_out_set(sets):
    for name in ("train", "heldout"):
        assert [line["style"] for line in sets[name][:10]] == [*NAMES, *NAMES]
    for i, name in enumerate(NAMES):
        assert {line["style"] for line in sets[f"heldout_{name}"]} == {name}
        assert sets["heldout"][i::5] == sets[f"heldout_{name}"][:12]
    lengths = {n: [len(x["prompt"].split()) for x in sets[f"heldout_{n}"]] for n in NAMES}
    assert max(lengths["short"]) < 25 and 60 <= min(lengths["long"]) <= max(lengths["long"]) <= 100


def test_a_seed_determines_each_style_whatever_the_others(sets):
    style = TextStyle(random=0.2)
    alone = generate_styles(20, 60, 5, style, ["long"])
    assert alone["heldout_long"] == alone["heldout"] == sets["heldout_long"]
    assert alone["train"] == [x for x in sets["train"] if x["style"] == "long"][:20]
    assert generate_styles(20, 60, 6, style, ["long"])["train"] != alone["train"]


@pytest.mark.parametrize("names", [["tall"], ["long", "long"], []])
def test_unknown_styles_are_errors(names):
    with pytest.raises(UserError, match="--styles=" + ",".join(names)):
        generate_styles(5, 5, 0, TextStyle(), names)


def test_an_engine_without_chinese_characters_is_an_error(sets, monkeypatch, capsys):
    monkeypatch.setattr("rewards.ocr.rules.readable_characters", lambda name: frozenset("abc"))
    with pytest.raises(UserError, match="--styles=chinese with --engine=paddleocr"):
        check_readable({"x": sets["heldout_chinese"]}, "paddleocr")
    monkeypatch.setattr("rewards.ocr.rules.readable_characters", lambda name: None)
    check_readable({"x": sets["heldout_chinese"]}, "paddleocr")
    assert "--engine=paddleocr" in capsys.readouterr().out


def test_chinese_files_are_read_back(sets, tmp_path):
    write(tmp_path / "heldout", sets["heldout_chinese"])
    assert "“" in (tmp_path / "heldout.jsonl").read_text(encoding="utf-8")


def test_chinese_words():
    assert len(set(chinese.WORDS)) == len(chinese.WORDS) == 240
    assert all(surface.count("{text}") == 1 for surface in chinese.SURFACES.values())

"""The rules on recognised lines, and `OCRReward` with an engine that invents them: without OCR."""

import random
import string

import numpy as np
import pytest

from rewards.ocr import rules
from rewards.ocr.engines import TextLine
from rewards.ocr.rules import (
    RULES,
    OCRReward,
    confident_spelling,
    even_frames,
    every_fourth_frame,
    flow_grpo_image,
    flow_grpo_video_frame,
    flow_grpo_video_mean,
    make_readable_check,
    spelling,
)


def lines(*texts, confidence=0.9):
    return [TextLine(text, confidence, ((0.0, 0.0),) * 4) for text in texts]


@pytest.mark.parametrize(
    "targets, read, value",
    [
        # one target alone: 1 - distance / length of the longer
        (("HELLO",), ["HELLO"], 1.0),
        (("HELLO",), ["hello"], 1.0),
        (("Hello World",), ["HELLO", "WORLD"], 1.0),  # broken over lines
        (("HELLO",), [], 0.0),
        (("HELLO",), ["ZZZZZ"], 0.0),
        (("HELLO",), ["H"], 0.2),
        (("HELLO",), ["HEL"], 0.6),
        (("HELLO",), ["HELO"], 0.8),
        (("HELLO",), ["HELPO"], 0.8),
        # among other text: 1 - s / (2 (n + s)) for s further characters
        (("HELLO",), ["HELLO", "HELLO"], 0.75),
        (("HELLO",), ["HELLOX"], 1 - 1 / 12),
        (("HELLO",), ["HELLO", "world SALE 50%"], 1 - 12 / 34),
        (("HELLO",), ["x" * 500, "HELLO"], 1 - 500 / 1010),
        # misspelt among other text: alone = 4/10, part HELPO (.8) counts .6, half the difference is
        # added
        (("HELLO",), ["HELPO", "XXXXX"], 0.4 + 0.5 * 0.2),
        # several targets
        (("OPEN", "24H"), ["OPEN", "24H"], 1.0),
        (("OPEN", "24H"), ["24H OPEN"], 1.0),
        (("OPEN", "24H"), ["OPEN24H"], 1.0),
        (("OPEN", "24H"), ["OPEN"], 0.5),
        (("OPEN", "OPEN"), ["OPEN"], 0.5),
        (("OPEN", "OPEN"), ["OPEN", "OPEN"], 1.0),
        (("OPEN", "24H"), ["OPFN", "24H"], (0.75 + 1) / 2),
        (("SALE", "SALES"), ["SALES", "SALE"], 1.0),
        (("SALE", "SALES"), ["SALE", "SALES"], 1.0),
        (("OPEN", "24H"), [], 0.0),
    ],
)
def test_spelling_by_hand(targets, read, value):
    assert spelling(lines(*read), targets) == pytest.approx(value)


def test_spelling_is_bounded_and_one_only_for_the_exact_text():
    rng = random.Random(0)
    for _ in range(400):
        targets = tuple(
            "".join(rng.choices("abc", k=rng.randint(1, 5))) for _ in range(rng.randint(1, 3))
        )
        text = "".join(rng.choices("abc", k=rng.randint(0, 15)))
        value = spelling(lines(text), targets)
        assert 0 <= value <= 1
        if len(text) != len("".join(targets)):
            assert value < 1


@pytest.mark.parametrize(
    "targets, read, value",
    [
        # (text, confidences of its characters); a letter that is right counts its confidence
        (("HELLO",), [("HELLO", (1, 1, 0.5, 1, 1))], 0.9),
        (("HELLO",), [("hel lo", (1, 1, 0.5, 0.1, 1, 1))], 0.9),  # a space does not count
        (("HELLO",), [("HELPO", (1, 1, 1, 0.1, 1))], 0.8),  # nor does a letter that is wrong
        (("HELLO",), [("HE", (0.5, 1)), ("LLO", (1, 1, 1))], 0.9),
        (("HELLO",), [("HELLO", (0.0,) * 5)], 0.0),
        (("HELLO",), [("HELLO", ())], 0.9),  # of the line
        (("HELLO",), [("HELLO", (0.5,))], 0.9),  # not those of its characters
        (("HELLO",), [("HELLO", (2, 1, 1, 1, -1))], 0.8),
        (("½",), [("½", (0.5,))], 0.5),  # three characters after normalisation
        (("É",), [("E\u0301", (0.1, 0.1))], 0.9),  # one: that of the line
        (("HELLO",), [("HELLOX", (1, 1, 1, 1, 1, 0.1))], 1 - 1 / 12),
        (("OPEN", "24H"), [("24H", (1, 0.4, 1)), ("OPEN", (1, 1, 1, 1))], 0.9),
        (("HELLO",), [], 0.0),
    ],
)
def test_confident_spelling_by_hand(targets, read, value):
    found = [TextLine(text, 0.9, ((0.0, 0.0),) * 4, sure) for text, sure in read]
    assert confident_spelling(found, targets) == pytest.approx(value)


def test_confident_spelling_is_spelling_where_the_reader_is_sure_and_never_more():
    rng = random.Random(0)
    for _ in range(300):
        targets = tuple(
            "".join(rng.choices("abc", k=rng.randint(1, 5))) for _ in range(rng.randint(1, 3))
        )
        texts = ["".join(rng.choices("abc ", k=rng.randint(0, 6))) for _ in range(2)]
        plain = spelling(lines(*texts), targets)
        assert confident_spelling(lines(*texts, confidence=1.0), targets) == plain
        doubtful = [
            TextLine(text, 0.9, ((0.0, 0.0),) * 4, tuple(rng.random() for _ in text))
            for text in texts
        ]
        assert 0 <= confident_spelling(doubtful, targets) <= plain + 1e-12


def test_spelling_repeats_never_pay():
    values = [spelling(lines(*["HELLO"] * n), ("HELLO",)) for n in range(1, 12)]
    assert values == sorted(values, reverse=True) and values[0] == 1 and values[-1] > 0.5
    wrong = [spelling(lines(*["HEXXX"] * n), ("HELLO",)) for n in range(1, 12)]
    assert wrong == sorted(wrong, reverse=True)


def test_spelling_each_letter_pays():
    values = [spelling(lines("GRANDOPENING"[:n]), ("GRAND OPENING",)) for n in range(13)]
    assert values == pytest.approx([n / 12 for n in range(13)])


def test_spelling_random_letters_hardly_pay():
    rng = random.Random(0)
    for count in (5, 20, 200):
        values = [
            spelling(lines("".join(rng.choices(string.ascii_lowercase, k=count))), ("OPEN HOUSE",))
            for _ in range(40)
        ]
        assert np.mean(values) < 0.2


@pytest.mark.parametrize(
    "read, image, video",
    [
        ([], 0.0, 0.0),
        (["HELLO"], 1.0, 1.0),
        (["Hel", "lo"], 1.0, 1.0),
        (["HELO"], 0.8, 0.8),
        (["xHELLO"], 1.0, 0.8),  # substring shortcut: image only
        (["HELLO", "world"], 1.0, 0.0),  # distance 5, clipped at the length of the target
        (["HELPO", "world"], 0.0, 0.0),
        (["zz"], 0.0, 0.0),
    ],
)
def test_flow_grpo_rules(read, image, video):
    assert flow_grpo_image(lines(*read), ("HELLO",)) == pytest.approx(image)
    assert flow_grpo_video_frame(lines(*read), ("HELLO",)) == pytest.approx(video)


def test_flow_grpo_quirks():
    # knows the first target only
    assert flow_grpo_image(lines("CLOSED"), ("CLOSED", "OPEN")) == 1.0
    assert flow_grpo_image(lines("OPEN"), ("CLOSED", "OPEN")) < 0.5
    assert flow_grpo_image(lines("HELLO", confidence=0.0), ("HELLO",)) == 0.0
    assert flow_grpo_image(lines("DON'T"), ("DON’T",)) == pytest.approx(0.8)  # punctuation as it is
    assert flow_grpo_video_mean([1.0, 0, 0, 0, 0]) == 1.0  # frames at 0 are dropped
    assert flow_grpo_video_mean([1.0, 0.5, 0]) == 0.75
    assert flow_grpo_video_mean([0, 0]) == 0.0


@pytest.mark.parametrize(
    "frames, most, indices",
    [
        (1, 17, (0,)),
        (5, 17, (0, 1, 2, 3, 4)),
        (17, 17, tuple(range(17))),
        (33, 17, tuple(range(0, 33, 2))),
        (81, 17, tuple(range(0, 81, 5))),
        (10, 2, (0, 9)),
        (9, 4, (0, 3, 5, 8)),
    ],
)
def test_even_frames(frames, most, indices):
    assert even_frames(frames, most) == indices


def test_even_frames_are_distinct_and_include_the_ends():
    for frames in range(1, 60):
        for most in range(2, 20):
            picked = even_frames(frames, most)
            assert len(set(picked)) == len(picked) == min(frames, most)
            assert (picked[0], picked[-1]) == (0, frames - 1)


def test_every_fourth_frame():
    assert every_fourth_frame(33, 2) == tuple(range(0, 33, 4))
    assert every_fourth_frame(1, 17) == (0,)


def reader(words):
    """An engine that reads `words[value of the first pixel]`."""
    return lambda rgb: lines(*words[int(rgb.flat[0])])


def frames_of(*values):
    return np.stack([np.full((2, 2, 3), value, np.uint8) for value in values])


def test_reward_combines_frames():
    engine = reader([[], ["HELLO"], ["HELO"]])
    score = OCRReward(engine=engine).score(frames_of(0, 1, 1, 2, 0), ("HELLO",))
    assert score.value == pytest.approx((0 + 1 + 1 + 0.8 + 0) / 5)  # frames without text count
    assert score.frame_values == pytest.approx((0, 1, 1, 0.8, 0))
    assert score.frames == (0, 1, 2, 3, 4)
    assert score.frame_texts == ("", "HELLO", "HELLO", "HELO", "")
    assert score.text == "HELLO | HELO"

    flow = OCRReward("flow_grpo_video", engine).score(frames_of(0, 1, 1, 2, 2), ("HELLO",))
    # frame 0 has no text and is dropped
    assert (flow.value, flow.frames) == (pytest.approx(0.8), (0, 4))
    assert OCRReward("flow_grpo_image", engine).score(
        frames_of(2), ("HELLO",)
    ).value == pytest.approx(0.8)
    assert OCRReward("spelling", engine).score(frames_of(2), ("HELLO",)).value == pytest.approx(0.8)
    assert (
        OCRReward(engine=engine, max_frames=2).score(frames_of(0, 1, 1, 1), ("HELLO",)).value == 0.5
    )


def test_reward_errors():
    with pytest.raises(ValueError, match=r"unknown OCR rule 'speling'.*spelling"):
        OCRReward("speling", engine=reader([]))
    with pytest.raises(ValueError, match="max_frames=1"):
        OCRReward(max_frames=1, engine=reader([]))
    reward = OCRReward(engine=reader([["A"]]))
    with pytest.raises(ValueError, match="uint8"):
        reward.score(np.zeros((1, 2, 2, 3), np.float32), ("A",))
    with pytest.raises(ValueError, match=r"\[T, H, W, 3\]"):
        reward.score(np.zeros((2, 2, 3), np.uint8), ("A",))
    with pytest.raises(ValueError, match=r"one string: pass \('A',\)"):
        reward.score(frames_of(0), "A")
    for rule in RULES:
        for targets in ((), ("",), ("A", " ")):
            with pytest.raises(ValueError, match="targets must be"):
                OCRReward(rule, engine=reader([["A"]])).score(frames_of(0), targets)
    with pytest.raises(ValueError, match="video of 2 frames"):
        OCRReward("flow_grpo_image", engine=reader([["A"]])).score(frames_of(0, 0), ("A",))


def test_characters_that_the_engine_cannot_read(monkeypatch):
    monkeypatch.setattr(rules, "readable_characters", lambda engine: frozenset("ABé "))
    check = make_readable_check("rapidocr")
    # Case, accents as separate characters, and width do not matter.
    check(("a B É", "be\u0301", "Ａ"))
    with pytest.raises(ValueError, match=r"C, d of 'ACdC'"):
        check(("A", "ACdC"))
    monkeypatch.setattr(rules, "readable_characters", lambda engine: None)
    assert make_readable_check("rapidocr") is None

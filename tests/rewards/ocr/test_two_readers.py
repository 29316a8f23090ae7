"""The reward that two readers must agree on."""

import functools
import importlib.util

import numpy as np
import pytest

from rewards.composite import CompositeReward
from rewards.ocr.engines import TextLine
from rewards.ocr.rules import OCRReward
from rewards.ocr.two_readers import TwoReaderReward
from tests.rewards.drawing import video

BOX = ((0.0, 0.0), (4.0, 0.0), (4.0, 2.0), (0.0, 2.0))


def reading(*texts, confidence=1.0):
    """An engine that reads texts[i] on a frame whose pixels are i."""
    return lambda frame: [TextLine(texts[frame.flat[0]], confidence, BOX)]


FRAMES = np.arange(3, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 8, 3), np.uint8)


def test_each_frame_counts_as_the_worse_reader_says():
    first, second = reading("OPEN", "OPFN", "OPEN"), reading("OPEN", "OPEN", "0P3N")
    score = TwoReaderReward("spelling", first, second, boxes=True).score(FRAMES, ("OPEN",))
    assert score.frame_values == (1.0, 0.75, 0.5) and score.value == 0.75
    assert score.text == "OPEN | OPFN | OPEN" and score.frames == (0, 1, 2)
    one, two = 2.75 / 3, 2.5 / 3
    assert dict(score.parts) == {
        "reader_one": pytest.approx(one),
        "reader_two": pytest.approx(two),
        "difference": pytest.approx(one - two),
    }
    assert score.boxes == OCRReward("spelling", first, boxes=True).score(FRAMES, ("OPEN",)).boxes
    same = TwoReaderReward("spelling", first, first.__call__).score(FRAMES, ("OPEN",))
    assert same.value == pytest.approx(one) and dict(same.parts)["difference"] == 0


def test_confidences_count_by_default():
    doubtful = reading(*["OPEN"] * 3, confidence=0.5)
    score = TwoReaderReward("confident", reading(*["OPEN"] * 3), doubtful).score(FRAMES, ("OPEN",))
    assert score.value == 0.5


def test_in_a_composite_its_parts_have_its_name():
    make = functools.partial(
        TwoReaderReward, "spelling", reading("OPEN", "OPEN", "OPEN"), reading("OPEN", "", "OPEN")
    )
    score = CompositeReward({"ocr": make}).score(FRAMES, ("OPEN",))
    assert dict(score.parts)["ocr.reader_two"] == pytest.approx(2 / 3) == score.value
    assert dict(score.parts)["ocr.reader_one"] == 1.0


def test_two_readers_must_differ():
    with pytest.raises(ValueError, match="'rapidocr'"):
        TwoReaderReward(reader_two="rapidocr")


@pytest.mark.skipif(
    importlib.util.find_spec("rapidocr_onnxruntime") is None,
    reason="needs pip install --no-deps rapidocr-onnxruntime==1.4.4",
)
def test_the_real_readers():
    reward = TwoReaderReward(max_frames=2)
    clean = reward.score(video("HELLO", height=128, width=256, size=36), ("HELLO",))
    wrong = reward.score(video("HELO", height=128, width=256, size=36), ("HELLO",))
    assert 0.9 < clean.value <= 1 and wrong.value < 0.8 and clean.frames == (0, 2)
    assert min(dict(clean.parts)[name] for name in ("reader_one", "reader_two")) == clean.value

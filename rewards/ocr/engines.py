"""OCR engines, which read the text in an image: `engine(rgb) -> list[TextLine]`, for two packages.

`rapidocr_v4` reads with the networks of an earlier release, PP-OCRv4, and so makes other mistakes
than `rapidocr`: a second reader without a second package.

Both packages find text boxes with a detector network and read each box with a recogniser network,
on the CPU. An engine is not thread-safe: build one per thread or process. Milliseconds per frame
with one line of text, on one thread of an AMD EPYC:

| engine                            | 64x128       | 128x128 | 256x256 |
|-----------------------------------|--------------|---------|---------|
| RapidOCR 3.10, as configured here | 11           | 13      | 22      |
| RapidOCR 3.10, its own defaults   | 487 (64x192) | 154     | 158     |
| PaddleOCR 2.9.1                   | 14 (64x192)  | 22      | 28      |

Two or more ONNX threads per engine made 64 varied frames 33 % slower: use more workers instead.
"""

import dataclasses
import importlib.util
import logging
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from rewards.base import import_problem

Point = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class TextLine:
    """One piece of text as the detector found it: usually a line, sometimes a word."""

    text: str
    confidence: float  # of the recogniser, in [0, 1]; its mean over the characters
    # four corners (x, y) in pixels of the frame, clockwise from the top left
    box: tuple[Point, ...]
    # the recogniser's confidence of each character of `text`; () where the engine was not asked
    confidences: tuple[float, ...] = ()


Engine = Callable[[np.ndarray], list[TextLine]]


def reading_order(lines: Iterable[TextLine]) -> list[TextLine]:
    """Return the lines sorted by rows from top to bottom, each row from left to right.

    A box belongs to a row if its vertical overlap with the row's first box is more than half of the
    lower box's height. (The packages compare top edges with a tolerance of 10 pixels, which
    confuses the rows of a 64-pixel frame.)
    """

    def top(line):
        return min(y for _, y in line.box)

    def bottom(line):
        return max(y for _, y in line.box)

    def left(line):
        return min(x for x, _ in line.box)

    rows: list[list[TextLine]] = []
    for line in sorted(lines, key=lambda line: (top(line), left(line))):
        for row in rows:
            shared = min(bottom(row[0]), bottom(line)) - max(top(row[0]), top(line))
            if shared > 0.5 * min(bottom(row[0]) - top(row[0]), bottom(line) - top(line)):
                row.append(line)
                break
        else:
            rows.append([line])
    return [line for row in rows for line in sorted(row, key=left)]


def _bgr(rgb: np.ndarray) -> np.ndarray:
    """Convert a frame uint8 [H, W, 3] from RGB to BGR, which both packages expect. Raises
    `ValueError` for anything else.
    """
    if (
        not isinstance(rgb, np.ndarray)
        or rgb.dtype != np.uint8
        or rgb.ndim != 3
        or rgb.shape[-1] != 3
    ):
        raise ValueError(
            f"an OCR engine reads one frame, a uint8 numpy array [H, W, 3] in RGB order, got "
            f"{getattr(rgb, 'dtype', type(rgb).__name__)} {list(np.shape(rgb))}"
        )
    return np.ascontiguousarray(rgb[..., ::-1])


def _warm_up(engine: Engine) -> None:
    """Read one drawn word, so that both networks are loaded. The packages load them at the first
    use.
    """
    import cv2

    frame = np.full((64, 128, 3), 255, np.uint8)
    cv2.putText(frame, "READY", (12, 42), cv2.FONT_HERSHEY_SIMPLEX, 1.0, (0, 0, 0), 2)
    engine(frame)


class RapidOCREngine:
    """PP-OCRv6 as ONNX, with the models of the `rapidocr` wheel: nothing is downloaded.

    min_confidence: lines with a lower confidence of the recogniser are dropped.
    small_side: frames with a short side below 64 pixels are enlarged for the detector until that
        side has this many pixels. Letters of 10 pixels on 32x96 frames are read exactly in 85 % of
        cases at their own size, in 98 % with 128 or 192.
    params: further RapidOCR settings, e.g. {"Det.box_thresh": 0.4}, which override those set here.
    characters: give `TextLine.confidences`; the texts and boxes are the same.

    Raises `ImportError`, with the command that installs the package, where it is missing.
    """

    def __init__(
        self,
        min_confidence: float = 0.5,
        small_side: int = 160,
        params: dict[str, Any] | None = None,
        characters: bool = False,
    ):
        self._characters = characters
        self._params = {
            "Global.use_cls": False,  # do not look for upside-down text
            "Global.log_level": "critical",  # else it warns of each frame without text
            "Global.text_score": min_confidence,
            "Global.return_word_box": characters,
            "EngineConfig.onnxruntime.intra_op_num_threads": 1,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            "EngineConfig.onnxruntime.enable_cpu_mem_arena": True,
            # smallest input of the recogniser, which grows for longer lines: 11 instead of 17 ms
            "Rec.rec_img_shape": [3, 48, 160],
        }
        self._limits = {
            False: {"Det.limit_type": "max", "Det.limit_side_len": 960},
            True: {"Det.limit_type": "min", "Det.limit_side_len": small_side},
        }
        self._overrides = dict(params or {})
        self._readers: dict[bool, Any] = {}  # built at first use: a run has frames of one size
        _warm_up(self)

    def __call__(self, rgb: np.ndarray) -> list[TextLine]:
        bgr = _bgr(rgb)
        reader = self._reader(small=min(bgr.shape[:2]) < 64)
        output = reader(bgr)
        if not output.txts:
            return []
        sure = [()] * len(output.txts)
        if self._characters:
            sure = [words[0][1] for words in output.word_results]
        return reading_order(
            TextLine(text, float(confidence), tuple((float(x), float(y)) for x, y in box), given)
            for text, confidence, box, given in zip(
                output.txts, output.scores, output.boxes, sure, strict=True
            )
        )

    def _reader(self, small: bool):
        if small not in self._readers:
            try:
                import onnxruntime  # noqa: F401  (RapidOCR's own error does not name the package)
                from rapidocr import RapidOCR
            except ImportError as error:
                raise ImportError(
                    import_problem(
                        "OCR engine 'rapidocr'", error, "pip install 'rapidocr==3.10.*' onnxruntime"
                    )
                ) from error
            reader: Any = RapidOCR(params=self._params | self._limits[small] | self._overrides)
            if self._characters:
                reader.cal_rec_boxes = _keep_confidences
            self._readers[small] = reader
        return self._readers[small]


def _keep_confidences(images, boxes, result, single_characters):
    """Replace RapidOCR's computation of the boxes of words, which would drop spaces and so
    assign confidences to the wrong characters: one entry (text, confidences, box) for each line.
    """
    result.word_results = tuple(
        [(text, tuple(map(float, info.confs)), 0)]
        for text, info in zip(result.txts, result.word_results)
    )
    return result


class RapidOCRv4Engine(RapidOCREngine):
    """PP-OCRv4, whose networks the wheel `rapidocr-onnxruntime` has, read by `rapidocr`.

    Options and errors: `RapidOCREngine`.
    """

    def __init__(self, *, params: dict[str, Any] | None = None, **options):
        package = importlib.util.find_spec("rapidocr_onnxruntime")
        if package is None or not package.submodule_search_locations:
            raise ImportError(
                "OCR engine 'rapidocr_v4' needs the networks in a package that is missing: pip "
                "install --no-deps rapidocr-onnxruntime==1.4.4"
            )
        folder = pathlib.Path(package.submodule_search_locations[0]) / "models"
        networks = {
            f"{kind}.model_path": str(folder / f"ch_PP-OCRv4_{kind.lower()}_infer.onnx")
            for kind in ("Det", "Rec")
        }
        super().__init__(params=networks | (params or {}), **options)


class PaddleOCREngine:
    """PaddleOCR 2.9.1, the engine of Flow-GRPO, with Flow-GRPO's settings: no angle classifier,
    CPU, lang='en'.

    lang: must fit the recogniser: 'ch' for the multilingual models.
    det_model_dir, rec_model_dir, cls_model_dir: folders with `inference.pdmodel` and
        `inference.pdiparams`. Give all three to run without a network (PaddleOCR downloads the
        classifier even if it is switched off), or none to let PaddleOCR download its own.
    limit_type, limit_side_len: size of the detector's input. The default is PaddleOCR's; 'min' and
        192 find more text on frames of 128 pixels or less: the mean reward of clean text of 12
        pixels or more rises from 0.77-0.95 to 0.96-1.
    characters: give `TextLine.confidences`.

    Raises `ImportError`, with the command that installs the package, where it is missing.
    """

    def __init__(
        self,
        lang: str = "en",
        det_model_dir: str | None = None,
        rec_model_dir: str | None = None,
        cls_model_dir: str | None = None,
        limit_type: str = "max",
        limit_side_len: int = 960,
        characters: bool = False,
    ):
        folders = {
            "det_model_dir": det_model_dir,
            "rec_model_dir": rec_model_dir,
            "cls_model_dir": cls_model_dir,
        }
        given = {key: str(value) for key, value in folders.items() if value is not None}
        if given and len(given) < 3:
            missing = ", ".join(sorted(folders.keys() - given.keys()))
            raise ValueError(
                f"PaddleOCR would download what is not given: add {missing}, or give none"
            )
        try:
            import paddleocr  # pyright: ignore[reportMissingImports]  (of an extra)
        except ImportError as error:
            raise ImportError(
                import_problem(
                    "OCR engine 'paddleocr'",
                    error,
                    "pip install paddleocr==2.9.1 paddlepaddle==3.3.1",
                )
            ) from error
        if not str(paddleocr.__version__).startswith("2."):
            raise ImportError(
                f"paddleocr {paddleocr.__version__} has another interface than 2.x: "
                f"pip install paddleocr==2.9.1 paddlepaddle==3.3.1"
            )
        self._reader = paddleocr.PaddleOCR(
            use_angle_cls=False,
            lang=lang,
            use_gpu=False,
            show_log=False,
            det_limit_type=limit_type,
            det_limit_side_len=limit_side_len,
            **given,
        )
        # else it warns of each frame without text
        logging.getLogger("ppocr").setLevel(logging.ERROR)
        if characters:
            decoder = self._reader.text_recognizer.postprocess_op
            decoder.decode = _with_confidences(decoder.decode, set(decoder.get_ignored_tokens()))
        _warm_up(self)

    def __call__(self, rgb: np.ndarray) -> list[TextLine]:
        output = self._reader.ocr(_bgr(rgb), cls=False)[0]  # None for a frame without text
        return reading_order(
            TextLine(
                text,
                float(confidence),
                tuple((float(x), float(y)) for x, y in box),
                getattr(confidence, "characters", ()),
            )
            for box, (text, confidence) in output or []
        )


class _Confidence(float):
    """A line's confidence, with those of its characters."""

    characters: tuple[float, ...] = ()


def _with_confidences(decode: Callable[..., list], ignored: set[int]) -> Callable[..., list]:
    """Wrap PaddleOCR's decoder, which gives a line's text and mean confidence, so that the
    confidence also has those of the characters.

    The decoder reads at each place of a line the likeliest character, and drops repetitions and
    `ignored` (nothing was read).
    """

    def decoded(indices, probabilities=None, *arguments, **options):
        lines = decode(indices, probabilities, *arguments, **options)
        if probabilities is None:
            return lines
        for at, (text, confidence, *rest) in enumerate(lines):
            tokens, found = [int(i) for i in indices[at]], []
            for place, token in enumerate(tokens):
                if token not in ignored and (place == 0 or token != tokens[place - 1]):
                    found.append(float(probabilities[at][place]))
            sure = _Confidence(confidence)
            sure.characters = tuple(found) if len(found) == len(text) else ()
            lines[at] = (text, sure, *rest)
        return lines

    return decoded


ENGINES = {
    "rapidocr": RapidOCREngine,
    "rapidocr_v4": RapidOCRv4Engine,
    "paddleocr": PaddleOCREngine,
}


def make_engine(name: str, **options) -> Engine:
    """Build the engine `name` of `ENGINES` and read one word with it, so that a broken installation
    shows at once. Raises `ValueError` for an unknown name.
    """
    if name not in ENGINES:
        raise ValueError(f"unknown OCR engine {name!r}: choose one of {', '.join(sorted(ENGINES))}")
    return ENGINES[name](**options)

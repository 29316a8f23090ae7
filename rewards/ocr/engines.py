"""Reads the text in a picture. One interface, `engine(rgb) -> list[TextLine]`, over two packages.

Both find text boxes with a detector network and read each box with a recogniser network, on the
CPU. An engine is not thread-safe: build one per thread or process. Measured on one thread of an AMD
EPYC, one line of text, ms per frame:

| engine                              | 64x128 | 128x128 | 256x256 |
|-------------------------------------|--------|---------|---------|
| RapidOCR 3.10, as configured here   | 11     | 13      | 22      |
| RapidOCR 3.10, its own defaults     | 487 (64x192) | 154 | 158   |
| PaddleOCR 2.9.1                     | 14 (64x192)  | 22  | 28    |

Two or more ONNX threads per engine made 64 varied frames 33 % slower: run more workers instead.
"""

import dataclasses
import importlib.util
import io
import logging
import os
import pathlib
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO

import numpy as np

from rewards.packages import import_problem

Point = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class TextLine:
    """One piece of text as the detector cut it out: usually a line, sometimes a word."""

    text: str
    confidence: float  # of the recogniser, in [0, 1]
    # four corners (x, y) in pixels of the frame, clockwise from the top left
    box: tuple[Point, ...]


Engine = Callable[[np.ndarray], list[TextLine]]


def reading_order(lines: Iterable[TextLine]) -> list[TextLine]:
    """Rows from top to bottom, each from left to right.

    A box belongs to a row if the heights shared with the row's first box are more than half of the
    lower of the two. (The packages compare top edges with a tolerance of 10 pixels, which mixes up
    the rows of a 64-pixel frame.)
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
    """[H, W, 3] RGB -> BGR, the order both packages expect of a numpy array."""
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
    """Reads one drawn word, so that both networks are loaded (the packages load them at the first
    use).
    """
    import cv2

    frame = np.full((64, 128, 3), 255, np.uint8)
    cv2.putText(frame, "READY", (12, 42), cv2.FONT_HERSHEY_SIMPLEX, 1.0, (0, 0, 0), 2)
    engine(frame)


class RapidOCREngine:
    """PP-OCRv6 as ONNX, with the models inside the `rapidocr` wheel: nothing is downloaded.

    min_confidence: lines the recogniser is less sure of are dropped. small_side: frames with a
    short side below 64 pixels are enlarged for the detector until it has this many
        pixels (exact reads of 10-pixel letters on 32x96 frames: 85 % as they are, 98 % with 128 or
        192).
    params: further RapidOCR settings, e.g. {"Det.box_thresh": 0.4}; they win over the ones chosen
    here.
    """

    def __init__(
        self,
        min_confidence: float = 0.5,
        small_side: int = 160,
        params: dict[str, Any] | None = None,
    ):
        self._params = {
            "Global.use_cls": False,  # no search for upside-down text
            "Global.log_level": "critical",  # otherwise a warning for each frame without text
            "Global.text_score": min_confidence,
            "EngineConfig.onnxruntime.intra_op_num_threads": 1,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            "EngineConfig.onnxruntime.enable_cpu_mem_arena": True,
            # narrowest canvas; a wider line widens it. 17 -> 11 ms
            "Rec.rec_img_shape": [3, 48, 160],
        }
        self._limits = {
            False: {"Det.limit_type": "max", "Det.limit_side_len": 960},
            True: {"Det.limit_type": "min", "Det.limit_side_len": small_side},
        }
        self._overrides = dict(params or {})
        self._readers: dict[bool, Any] = {}  # built when first needed: a run has frames of one size
        _warm_up(self)

    def __call__(self, rgb: np.ndarray) -> list[TextLine]:
        bgr = _bgr(rgb)
        found = self._reader(small=min(bgr.shape[:2]) < 64)(bgr)
        if not found.txts:
            return []
        return reading_order(
            TextLine(text, float(confidence), tuple((float(x), float(y)) for x, y in box))
            for text, confidence, box in zip(found.txts, found.scores, found.boxes)
        )

    def _reader(self, small: bool):
        if small not in self._readers:
            try:
                import onnxruntime  # noqa: F401  (RapidOCR's own message does not say what to install)
                from rapidocr import RapidOCR
            except ImportError as error:
                raise ImportError(
                    import_problem(
                        "OCR engine 'rapidocr'", error, "pip install 'rapidocr==3.10.*' onnxruntime"
                    )
                ) from error
            self._readers[small] = RapidOCR(
                params=self._params | self._limits[small] | self._overrides
            )
        return self._readers[small]


class PaddleOCREngine:
    """PaddleOCR 2.9.1, the engine of Flow-GRPO, with Flow-GRPO's settings (no angle classifier,
    CPU, lang='en').

    det_model_dir, rec_model_dir, cls_model_dir: folders with `inference.pdmodel` and
    `inference.pdiparams`.
        Give all three to run without a network (PaddleOCR downloads the classifier even if it is
        switched off), or none to let PaddleOCR download its own. `lang` must fit the recogniser:
        'ch' for the multilingual models.
    limit_type, limit_side_len: size of the detector's input. The default is PaddleOCR's; 'min' and
    192 find
        more text on frames of 128 pixels or less (mean reward .77-.95 -> .96-1 on clean text of 12
        pixels or more).
    """

    def __init__(
        self,
        lang: str = "en",
        det_model_dir: str | None = None,
        rec_model_dir: str | None = None,
        cls_model_dir: str | None = None,
        limit_type: str = "max",
        limit_side_len: int = 960,
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
            import paddleocr
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
        # else a warning for each frame without text
        logging.getLogger("ppocr").setLevel(logging.ERROR)
        _warm_up(self)

    def __call__(self, rgb: np.ndarray) -> list[TextLine]:
        found = self._reader.ocr(_bgr(rgb), cls=False)[0]  # None on a frame without text
        return reading_order(
            TextLine(text, float(confidence), tuple((float(x), float(y)) for x, y in box))
            for box, (text, confidence) in found or []
        )


# --- what an engine can read ----------------------------------------------------------------------


def readable_characters(engine: str) -> frozenset[str] | None:
    """Return the characters that the recogniser of an engine, built without options, knows.

    None where its package is not installed, or keeps the list elsewhere. They are read from the
    package's files; the networks are not loaded.
    """
    name, file = CHARACTER_LISTS[engine]
    package = importlib.util.find_spec(name)
    found = (
        sorted(pathlib.Path(package.submodule_search_locations[0]).glob(file)) if package else []
    )
    if len(found) != 1:
        return None
    text = (
        found[0].read_text(encoding="utf-8")
        if found[0].suffix == ".txt"
        else _onnx_metadata(found[0], "character")
    )
    return frozenset(text.replace("\n", "")) | {" "} if text else None


def _onnx_metadata(path: pathlib.Path, key: str) -> str | None:
    """Return what an ONNX file says under `key` in its `metadata_props`; the rest of the file is
    skipped.

    A field of protobuf is its tag, 8 x number + kind, and for kind 2 a length and so many bytes. Of
    a model's fields `metadata_props` has number 14; of an entry's, key has 1 and value 2.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        while file.tell() < size:
            tag, length = _varint(file), _varint(file)
            if tag % 8 == 0:
                continue  # the number itself, not a length
            if tag % 8 != 2:
                return None
            if tag != 8 * 14 + 2:
                file.seek(length, os.SEEK_CUR)
                continue
            entry, fields = io.BytesIO(file.read(length)), {}
            while field := entry.read(1):
                fields[field[0] // 8] = entry.read(_varint(entry)).decode("utf-8")
            if fields.get(1) == key:
                return fields.get(2)
    return None


def _varint(file: BinaryIO) -> int:
    """Read a whole number, seven bits a byte, the lowest first; a byte's highest bit says that
    another follows.
    """
    value, shift = 0, 0
    while True:
        byte = file.read(1)[0]
        value, shift = value | (byte & 127) << shift, shift + 7
        if byte < 128:
            return value


# engine: its package, and the file there that holds its characters
CHARACTER_LISTS = {
    "rapidocr": ("rapidocr", "models/*_rec_*.onnx"),
    "paddleocr": ("paddleocr", "ppocr/utils/en_dict.txt"),
}
ENGINES = {"rapidocr": RapidOCREngine, "paddleocr": PaddleOCREngine}


def make_engine(name: str, **options) -> Engine:
    """Builds an engine and reads a first word with it, so that a broken installation shows at once."""
    if name not in ENGINES:
        raise ValueError(f"unknown OCR engine {name!r}: choose one of {', '.join(sorted(ENGINES))}")
    return ENGINES[name](**options)

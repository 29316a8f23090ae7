"""What a training run writes down, and how to read it back.

    runs/NAME/config.json             every setting, and the command
    runs/NAME/metrics.jsonl           one line an epoch
    runs/NAME/evals.jsonl             one line a held-out evaluation
    runs/NAME/evals_33_frames.jsonl   the same for a further length of its videos
    runs/NAME/previews/eval_000012.npz  uint8 videos [n, T, H, W, 3] of an evaluation's first prompts
    runs/NAME/tensorboard/            the same numbers and pictures
    runs/NAME/trackers.json           the run's ids at Weights & Biases and MLflow, where it is logged there

The JSON is strict: NaN and infinities are written as null and read back as NaN. Every line is on disk when the call
returns; a file that is replaced is replaced whole. OSError (disk full, read-only folder) is left to the caller.
"""

import contextlib
import io
import json
import math
import numbers
import os
import pathlib

import numpy as np

from grpo import sinks
from grpo.sinks import Sheet, TensorBoard
from wan_jax import media

METRICS, EVALUATIONS, CONFIG = "metrics.jsonl", "evals.jsonl", "config.json"
EXPERTS = "experts"  # key in an epoch's record: the metrics of each of two trained experts, by name
GIF_FRAMES, GIF_FPS = 16, 8  # of a clip's previews on a sheet


class RunLog:
    """Writes one run's folder.

    resume_epoch: the epoch of the checkpoint the run continues after; later records are dropped, because the run will
    write them again. None: the run starts at the beginning, and records of an earlier attempt are set aside as
    `*.old`.
    trackers: `config.log`, which says where numbers and previews go beside; None: to TensorBoard alone.
    """

    def __init__(self, folder, resume_epoch: int | None = None, trackers=None):
        self.folder = pathlib.Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in (METRICS, EVALUATIONS, *(p.name for p in self.folder.glob("evals_*_frames.jsonl"))):
            path = self.folder / name
            if not path.exists():
                continue
            if resume_epoch is None:
                os.replace(path, path.with_name(name + ".old"))
            else:
                kept = [r for r in _read_lines(path) if r["epoch"] <= resume_epoch]
                write_atomically(path, b"".join(_line(r) for r in kept))
        last = -1 if resume_epoch is None else resume_epoch
        for path in (self.folder / "previews").glob("eval_*.npz"):
            if int(path.stem.removeprefix("eval_")) > last:
                path.unlink()
        self._sinks = [TensorBoard(self.folder / "tensorboard", last + 1)]
        if trackers is not None:
            self._sinks += sinks.trackers(self.folder, trackers, resume_epoch is not None)

    def config(self, values: dict) -> None:
        """Every setting of the run, nested; values that JSON cannot hold are written as text."""
        values = plain(values)
        write_atomically(self.folder / CONFIG, json.dumps(values, indent=2, allow_nan=False).encode() + b"\n")
        for sink in self._sinks:
            sink.config({key.replace("/", "."): value for key, value in flatten(values).items()})

    def epoch(self, record: dict) -> None:
        """One epoch's numbers; record["epoch"] is its number, groups of numbers may be nested."""
        self._write(METRICS, "train", record)

    def evaluation(self, record: dict, videos: np.ndarray | None = None, frames: int | None = None) -> None:
        """One held-out evaluation and uint8 videos [n, T, H, W, 3] of its first n prompts.

        The videos are written first: a line in evals.jsonl has its previews. frames: of an evaluation at a further
        length, which has a file and tags of its own, and no previews on disk.
        """
        tag, name = "eval" if frames is None else f"eval_{frames}_frames", evaluations_name(frames)
        if videos is not None and len(videos):
            if frames is None:
                path = preview_path(self.folder, _epoch_of(record))
                path.parent.mkdir(exist_ok=True)
                file = io.BytesIO()
                np.savez_compressed(file, videos=videos)
                write_atomically(path, file.getvalue())
            self._show(f"{tag}/previews", videos, record["epoch"])
        self._write(name, tag, record)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()

    def _write(self, name: str, tag: str, record: dict) -> None:
        epoch = _epoch_of(record)
        append_line(self.folder / name, record)
        values = {f"{tag}/{key}": float(value) for key, value in flatten(record).items()
                  if isinstance(value, numbers.Real) and key != "epoch"}
        for sink in self._sinks:
            sink.numbers(values, epoch)

    def _show(self, tag: str, videos: np.ndarray, epoch: int) -> None:
        """A sheet of the videos: a PNG for pictures, an animated GIF of some frames for clips."""
        times = np.unique(np.linspace(0, videos.shape[1] - 1, min(videos.shape[1], GIF_FRAMES)).round().astype(int))
        lowest, highest = (128, 256) if len(times) == 1 else (64, 128)
        sheets = np.stack([media.contact_sheet(np.stack([media.fit_height(f, lowest, highest) for f in videos[:, t]]))
                           for t in times])  # [t, sheet height, sheet width, 3]
        data = media.png_bytes(sheets[0]) if len(sheets) == 1 else media.gif_bytes(sheets, GIF_FPS)
        sheet = Sheet(data, ".png" if len(sheets) == 1 else ".gif", *sheets.shape[1:3])
        for sink in self._sinks:
            sink.previews(tag, sheet, epoch)


class SilentLog:
    """Takes the place of `RunLog` in the processes that write nothing."""

    def config(self, values: dict) -> None: ...
    def epoch(self, record: dict) -> None: ...
    def evaluation(self, record: dict, videos: np.ndarray | None = None, frames: int | None = None) -> None: ...
    def close(self) -> None: ...


def read_metrics(folder) -> list[dict]:
    """The records of metrics.jsonl, oldest first; [] when there are none. A last line cut off by a kill is ignored."""
    return _read_lines(pathlib.Path(folder, METRICS))


def read_evaluations(folder, frames: int | None = None) -> list[dict]:
    """The records of evals.jsonl, oldest first; [] when there are none. A last line cut off by a kill is ignored.
    frames: those at a further length."""
    return _read_lines(pathlib.Path(folder, evaluations_name(frames)))


def evaluations_name(frames: int | None) -> str:
    return EVALUATIONS if frames is None else f"evals_{frames}_frames.jsonl"


def read_config(folder) -> dict:
    """config.json; {} when there is none."""
    path = pathlib.Path(folder, CONFIG)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def read_previews(folder, epoch: int) -> np.ndarray | None:
    """uint8 [n, T, H, W, 3] of the evaluation after `epoch`; None when there are none."""
    path = preview_path(folder, epoch)
    if not path.exists():
        return None
    with np.load(path) as file:
        return file["videos"]


def preview_path(folder, epoch: int) -> pathlib.Path:
    return pathlib.Path(folder, "previews", f"eval_{epoch:06d}.npz")


def flatten(values: dict, prefix: str = "") -> dict:
    """{'a': {'b': 1}} -> {'a/b': 1}."""
    flat = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}/") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def append_line(path: pathlib.Path, record: dict) -> None:
    """Adds a record to a JSONL file and waits for the disk. Takes back what was written of a line that failed."""
    data, size = _line(record), path.stat().st_size if path.exists() else 0
    try:
        with open(path, "ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        with contextlib.suppress(OSError):
            os.truncate(path, size)
        raise


def write_atomically(path: pathlib.Path, data: bytes) -> None:
    """The whole file or no change, whatever happens in between."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _epoch_of(record: dict) -> int:
    epoch = record.get("epoch")
    if isinstance(epoch, bool) or not isinstance(epoch, numbers.Integral):
        raise ValueError(f"a record needs a whole number under 'epoch', got {epoch!r}")
    return int(epoch)


def _line(record: dict) -> bytes:
    return (json.dumps(plain(record), ensure_ascii=False, allow_nan=False) + "\n").encode(errors="replace")


def plain(value):
    """What JSON can hold: arrays and their scalars as numbers and lists, tuples as lists, non-finite floats as null."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, bool, int)) else str(value)


def _read_lines(path: pathlib.Path) -> list[dict]:
    if not path.exists():
        return []
    lines = [line for line in path.read_bytes().decode(errors="replace").split("\n") if line.strip()]
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            _epoch_of(record)
        except (ValueError, AttributeError) as error:
            if number == len(lines):
                break  # cut off by a kill
            raise ValueError(f"{path}: line {number} of {len(lines)} is not a record ({error}); repair or remove it "
                             "to read this run") from None
        records.append(_nan_for_null(record))
    return records


def _nan_for_null(value):
    if isinstance(value, dict):
        return {k: _nan_for_null(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_nan_for_null(v) for v in value]
    return math.nan if value is None else value

"""What a training run writes down, and how to read it back.

    runs/NAME/config.json             every setting, and the command
    runs/NAME/metrics.jsonl           one line an epoch
    runs/NAME/evals.jsonl             one line a held-out evaluation
    runs/NAME/evals_33_frames.jsonl   the same for a further length of its videos
    runs/NAME/previews/eval_000012.npz  uint8 videos [n, T, H, W, 3] of an evaluation's first
                                        prompts
    runs/NAME/tensorboard/            the same numbers and pictures
    runs/NAME/trackers.json           the run's ids at Weights & Biases and MLflow, where it is
                                      logged there

The JSON is strict: NaN and infinities are written as null and read back as NaN. Every line is on
disk when the call returns; a file that is replaced is replaced whole. OSError (disk full, read-only
folder) is left to the caller. Whatever cannot be read back is left out, with one warning for each
file.
"""

import contextlib
import io
import json
import math
import numbers
import os
import pathlib
import re
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterable

import numpy as np

from grpo.records import trackers as sinks
from grpo.records.run_files import read_json, warn, write_atomically
from grpo.records.trackers import Sheet, TensorBoard
from wan_jax.storage import media

METRICS, EVALUATIONS, CONFIG = "metrics.jsonl", "evals.jsonl", "config.json"
EXPERTS = "experts"  # key in an epoch's record: the metrics of each of two trained experts, by name
PREVIEW = re.compile(r"eval_(\d+)\.npz")
# of a cut or damaged .npz
UNREADABLE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)
GIF_FRAMES, GIF_FPS = 16, 8  # of a clip's previews on a sheet


class RunLog:
    """Writes one run's folder.

    resume_epoch: the epoch of the checkpoint the run continues after; later records are dropped,
    because the run will write them again, and a warning says which earlier ones are missing. A file
    with lines that are no records is kept as `*.damaged`. None: the run starts at the beginning,
    and records of an earlier attempt are set aside as `*.old`. trackers: `config.log`, which says
    where numbers and previews go beside; None: to TensorBoard alone.
    """

    def __init__(self, folder, resume_epoch: int | None = None, trackers=None):
        self.folder = pathlib.Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in (
            METRICS,
            EVALUATIONS,
            *(p.name for p in self.folder.glob("evals_*_frames.jsonl")),
        ):
            path = self.folder / name
            if not path.exists():
                continue
            if resume_epoch is None:
                os.replace(path, path.with_name(name + ".old"))
            else:
                records, whole = _parsed(path, _epoch_of)
                if not whole:
                    shutil.copy2(path, path.with_name(name + ".damaged"))
                write_atomically(
                    path, b"".join(_line(r) for r in records if r["epoch"] <= resume_epoch)
                )
        if resume_epoch is not None:
            warn_of_missing(self.folder, resume_epoch)
        last = -1 if resume_epoch is None else resume_epoch
        for path in (self.folder / "previews").glob("eval_*.npz"):
            if (named := PREVIEW.fullmatch(path.name)) and int(named[1]) > last:
                path.unlink()
        self._sinks = [TensorBoard(self.folder / "tensorboard", last + 1)]
        if trackers is not None:
            self._sinks += sinks.trackers(self.folder, trackers, resume_epoch is not None)

    def config(self, values: dict) -> None:
        """Every setting of the run, nested; values that JSON cannot hold are written as text."""
        values = plain(values)
        write_atomically(
            self.folder / CONFIG, json.dumps(values, indent=2, allow_nan=False).encode() + b"\n"
        )
        for sink in self._sinks:
            sink.config({key.replace("/", "."): value for key, value in flatten(values).items()})

    def epoch(self, record: dict) -> None:
        """One epoch's numbers; record["epoch"] is its number, groups of numbers may be nested."""
        self._write(METRICS, "train", record)

    def evaluation(
        self, record: dict, videos: np.ndarray | None = None, frames: int | None = None
    ) -> None:
        """One held-out evaluation and uint8 videos [n, T, H, W, 3] of its first n prompts.

        The videos are written first: a line in evals.jsonl has its previews. frames: of an
        evaluation at a further length, which has a file and tags of its own, and no previews on
        disk.
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
        values = {
            f"{tag}/{key}": float(value)
            for key, value in flatten(record).items()
            if isinstance(value, numbers.Real) and key != "epoch"
        }
        for sink in self._sinks:
            sink.numbers(values, epoch)

    def _show(self, tag: str, videos: np.ndarray, epoch: int) -> None:
        """A sheet of the videos: a PNG for pictures, an animated GIF of some frames for clips."""
        times = np.unique(
            np.linspace(0, videos.shape[1] - 1, min(videos.shape[1], GIF_FRAMES))
            .round()
            .astype(int)
        )
        lowest, highest = (128, 256) if len(times) == 1 else (64, 128)
        sheets = np.stack(
            [
                media.contact_sheet(
                    np.stack([media.fit_height(f, lowest, highest) for f in videos[:, t]])
                )
                for t in times
            ]
        )  # [t, sheet height, sheet width, 3]
        data = media.png_bytes(sheets[0]) if len(sheets) == 1 else media.gif_bytes(sheets, GIF_FPS)
        sheet = Sheet(data, ".png" if len(sheets) == 1 else ".gif", *sheets.shape[1:3])
        for sink in self._sinks:
            sink.previews(tag, sheet, epoch)


class SilentLog:
    """Takes the place of `RunLog` in the processes that write nothing."""

    def config(self, values: dict) -> None: ...
    def epoch(self, record: dict) -> None: ...
    def evaluation(
        self, record: dict, videos: np.ndarray | None = None, frames: int | None = None
    ) -> None: ...
    def close(self) -> None: ...


def warn_of_missing(folder, epoch: int) -> None:
    """Warn of records that a run lacks although its checkpoint of `epoch` exists."""
    if missing := ranges(
        set(range(1, epoch + 1)) - {record["epoch"] for record in read_metrics(folder)}
    ):
        warn(
            f"{pathlib.Path(folder, METRICS)} has no record of epoch(s) {missing}, which the "
            f"checkpoint of epoch {epoch} contains: the run continues, but its log and report lack "
            "them"
        )
    if epoch > 0 and 0 not in [record["epoch"] for record in read_evaluations(folder)]:
        warn(
            f"{pathlib.Path(folder, EVALUATIONS)} has no evaluation of epoch 0: the report cannot "
            "compare with the model before training"
        )


def ranges(values: Iterable[int]) -> str:
    """{1, 2, 3, 7} -> '1 to 3, 7'."""
    spans = []
    for value in sorted(values):
        if spans and spans[-1][1] == value - 1:
            spans[-1][1] = value
        else:
            spans.append([value, value])
    return ", ".join(f"{first} to {last}" if last > first else str(first) for first, last in spans)


def read_metrics(folder) -> list[dict]:
    """The records of metrics.jsonl, oldest first; [] when there are none. A last line cut off by a
    kill is ignored.
    """
    return _read_lines(pathlib.Path(folder, METRICS))


def read_evaluations(folder, frames: int | None = None) -> list[dict]:
    """The records of evals.jsonl, oldest first; [] when there are none. A last line cut off by a
    kill is ignored. frames: those at a further length.
    """
    return _read_lines(pathlib.Path(folder, evaluations_name(frames)))


def evaluations_name(frames: int | None) -> str:
    return EVALUATIONS if frames is None else f"evals_{frames}_frames.jsonl"


def read_config(folder) -> dict:
    """config.json; {} when there is none, or none that can be read."""
    return read_json(pathlib.Path(folder, CONFIG))


def read_previews(folder, epoch: int) -> np.ndarray | None:
    """uint8 [n, T, H, W, 3] of the evaluation after `epoch`; None when there are none, or none that
    can be read.
    """
    path = preview_path(folder, epoch)
    if not path.exists():
        return None
    try:
        with np.load(path) as file:
            videos = file["videos"]
        if videos.dtype == np.uint8 and videos.ndim == 5 and videos.shape[-1] == 3 and videos.size:
            return videos
        problem = f"{videos.dtype} {videos.shape} is not uint8 [n, T, H, W, 3]"
    except UNREADABLE as error:
        problem = str(error)
    warn(f"{path} cannot be read and is left out: {problem}")
    return None


def preview_path(folder, epoch: int) -> pathlib.Path:
    return pathlib.Path(folder, "previews", f"eval_{epoch:06d}.npz")


def flatten(values: dict, prefix: str = "") -> dict:
    """{'a': {'b': 1}} -> {'a/b': 1}."""
    flat = {}
    for key, value in values.items():
        flat |= (
            flatten(value, f"{prefix}{key}/")
            if isinstance(value, dict)
            else {f"{prefix}{key}": value}
        )
    return flat


def append_line(path: pathlib.Path, record: dict) -> None:
    """Adds a record to a JSONL file and waits for the disk. Takes back what was written of a line
    that failed.
    """
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


def number(record: dict, key: str) -> float | None:
    """record[key] where it is a number, NaN included; else None."""
    value = record.get(key)
    return value if isinstance(value, numbers.Real) and not isinstance(value, bool) else None


def check_evaluation(record: dict) -> None:
    """Raise ValueError unless the record has what every reader of evaluations uses."""
    _epoch_of(record)
    if missing := [key for key in ("reward", "low", "high", "num") if number(record, key) is None]:
        raise ValueError(f"no number under {', '.join(missing)}")
    for key, kind in (("rewards", numbers.Real), ("prompts", str), ("texts", str)):
        if not (
            isinstance(record.get(key), list)
            and all(isinstance(value, kind) for value in record[key])
            and len(record[key]) == len(record["rewards"])
        ):
            raise ValueError(f"no list of one entry a prompt under {key}")


def _epoch_of(record: dict) -> int:
    epoch = record.get("epoch")
    if isinstance(epoch, bool) or not isinstance(epoch, numbers.Integral):
        raise ValueError(f"a record needs a whole number under 'epoch', got {epoch!r}")
    return int(epoch)


def _line(record: dict) -> bytes:
    return (json.dumps(plain(record), ensure_ascii=False, allow_nan=False) + "\n").encode(
        errors="replace"
    )


def plain(value):
    """What JSON can hold: arrays and their scalars as numbers and lists, tuples as lists,
    non-finite floats as null.
    """
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
    """The records of one of the run's .jsonl files that have what their readers use."""
    return _parsed(path, _epoch_of if path.name == METRICS else check_evaluation)[0]


def _parsed(path: pathlib.Path, check: Callable[[dict], object]) -> tuple[list[dict], bool]:
    """The lines that are records, and whether all are; a warning names the others. `check` raises
    ValueError on a record that cannot be used. A last line that is no JSON was cut off by a kill
    and does not count.
    """
    if not path.exists():
        return [], True
    lines = [
        line for line in path.read_bytes().decode(errors="replace").split("\n") if line.strip()
    ]
    records, bad = [], []
    for i, line in enumerate(lines, 1):
        try:
            record = _nan_for_null(json.loads(line))
        except (ValueError, RecursionError) as error:
            if i < len(lines):
                bad.append(f"line {i} ({error})")
            continue
        try:
            if not isinstance(record, dict):
                raise ValueError("not a JSON object")
            check(record)
            records.append(record)
        except ValueError as error:
            bad.append(f"line {i} ({error})")
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        warn(
            f"{path}: {len(bad)} of {len(lines)} lines cannot be read and are left out: "
            f"{', '.join(bad[:3])}{more}"
        )
    return records, not bad


def _nan_for_null(value):
    if isinstance(value, dict):
        return {k: _nan_for_null(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_nan_for_null(v) for v in value]
    return math.nan if value is None else value

"""Writes and reads the records of a training run.

    runs/NAME/config.json               every setting, and the command line
    runs/NAME/provenance.json           for each start: time, hardware, versions, commit, values in
                                        force (`grpo.records.provenance`)
    runs/NAME/run.log                   every line that the run printed (`grpo.records.run_output`)
    runs/NAME/metrics.jsonl             one line per epoch
    runs/NAME/evals.jsonl               one line per held-out evaluation
    runs/NAME/evals_33_frames.jsonl     the same for videos of another length
    runs/NAME/evals_96x192_1_frames.jsonl  the same for another size, `eval.more_sizes`
    runs/NAME/evals_long.jsonl          the same for other prompts, `eval.more_prompts` "long"
    runs/NAME/previews/eval_000012.npz  videos of an evaluation's first prompts,
                                        uint8 [n, T, H, W, 3]
    runs/NAME/previews/000/epoch_000012.png or .mp4: the first prompt's video with prompt and reward,
                                        at the trackers eval/previews/000
    runs/NAME/tensorboard/              the same numbers and pictures
    runs/NAME/trackers.json             ids of the run at Weights & Biases and MLflow, if used

The JSON is strict: NaN and infinities are written as null and read back as NaN. Every line is on
disk when the call returns, and files are replaced atomically. OSError (disk full, read-only folder)
is left to the caller. What cannot be read back is left out, with one warning for each file.
"""

import io
import json
import numbers
import os
import pathlib
import re
import shutil
import zipfile
import zlib
from collections import deque
from collections.abc import Iterable
from typing import Any

import numpy as np

from grpo.records import previews
from grpo.records.json_lines import append_line, flatten, parse_lines, plain, record_line
from grpo.records.progress import RECENT
from grpo.records.run_files import read_json, warn, write_atomically
from grpo.records.trackers import TensorBoard, open_trackers

METRICS, EVALUATIONS, CONFIG = "metrics.jsonl", "evals.jsonl", "config.json"
PROVENANCE, STARTS = "provenance.json", "starts"  # its file, and the only key in it
PAIRS = "side_by_side"  # folder of pictures of two evaluations, which the report writes
EXPERTS = "experts"  # key of an epoch's record: metrics of each expert by name, if two are trained
PREVIEW = re.compile(r"(?:eval|epoch)_(\d+)\.(?:npz|png|mp4)")
# raised on a truncated or damaged .npz
UNREADABLE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)


class RunLog:
    """Writes the records of one run.

    Args:
      folder: the run's folder, made if needed.
      resume_epoch: epoch of the checkpoint from which the run continues. Later records are dropped,
        because the run will write them again; missing earlier ones cause a warning; a file with
        unreadable lines is copied to `*.damaged`. None: the run starts at the beginning, and
        records of an earlier attempt are renamed to `*.old`.
      settings: `config.log`, which chooses further trackers; None: TensorBoard alone.
    """

    def __init__(self, folder, resume_epoch: int | None = None, settings=None):
        self.folder = pathlib.Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.epochs: deque[dict] = deque(maxlen=RECENT)  # the newest records
        self.evaluations: deque[dict] = deque(maxlen=RECENT)
        resumed = resume_epoch is not None
        self.resumed = resumed
        last = resume_epoch if resumed else -1  # the last epoch whose records stay
        # 1 drop the records after it
        others = map(evaluations_name, other_series(self.folder))
        for name in (METRICS, EVALUATIONS, *others):
            path = self.folder / name
            if not path.exists():
                continue
            if not resumed:
                os.replace(path, path.with_name(name + ".old"))
                continue
            records, complete = parse_lines(path, _epoch_of)
            if not complete:
                shutil.copy2(path, path.with_name(name + ".damaged"))
            write_atomically(path, b"".join(record_line(r) for r in records if r["epoch"] <= last))
        if resumed:
            warn_of_missing(self.folder, resume_epoch)
            self.epochs.extend(read_metrics(self.folder))
            self.evaluations.extend(read_evaluations(self.folder))
        # 2 drop the previews after it
        folder = self.folder / "previews"
        for path in (*folder.glob("eval_*"), *folder.glob("[0-9][0-9][0-9]/epoch_*")):
            if (named := PREVIEW.fullmatch(path.name)) and int(named[1]) > last:
                path.unlink()
        if not resumed:  # what the report wrote of an earlier attempt's
            for path in self.folder.glob(f"{PAIRS}/[0-9][0-9][0-9].*"):
                path.unlink()
        # 3 open the trackers
        self._trackers = [TensorBoard(self.folder / "tensorboard", last + 1)]
        if settings is not None:
            self._trackers += open_trackers(self.folder, settings, resumed)

    def config(self, values: dict) -> None:
        """Write every setting, nested; values that JSON cannot hold are written as text."""
        settings: Any = plain(values)
        text = json.dumps(settings, indent=2, allow_nan=False)
        write_atomically(self.folder / CONFIG, text.encode() + b"\n")
        flat = {key.replace("/", "."): value for key, value in flatten(settings).items()}
        for tracker in self._trackers:
            tracker.config(flat)

    def provenance(self, entry: dict) -> None:
        """Add the entry of this start to provenance.json."""
        path = self.folder / PROVENANCE
        starts = read_starts(self.folder) if self.resumed else []
        text = json.dumps(plain({STARTS: [*starts, entry]}), indent=1, allow_nan=False)
        write_atomically(path, text.encode() + b"\n")

    def epoch(self, record: dict) -> None:
        """Write one epoch's numbers, which may be nested; record["epoch"] is the epoch."""
        self._write(METRICS, "train", record)
        self.epochs.append(record)

    def evaluation(
        self, record: dict, videos: np.ndarray | None = None, series: int | str | None = None
    ) -> None:
        """Write one held-out evaluation.

        Args:
          record: see `check_evaluation` for the keys that readers need.
          videos: previews, uint8 [n, T, H, W, 3] of the first n prompts. They are written first, so
            that every line of evals.jsonl has its previews.
          series: length of the videos, or name of the prompts, if they are not the run's own; such an
            evaluation has a file and tags of its own, and no previews on disk.
        """
        tag = evaluations_name(series).removesuffix(".jsonl").replace("evals", "eval", 1)
        if videos is not None and len(videos):
            if series is None:
                path = preview_path(self.folder, _epoch_of(record))
                path.parent.mkdir(exist_ok=True)
                file = io.BytesIO()
                np.savez_compressed(file, videos=videos)
                write_atomically(path, file.getvalue())
            self._show(f"{tag}/previews", videos, record, series is None)
        self._write(evaluations_name(series), tag, record)
        if series is None:
            self.evaluations.append(record)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()

    def _write(self, name: str, tag: str, record: dict) -> None:
        epoch = _epoch_of(record)
        append_line(self.folder / name, record)
        values = {
            f"{tag}/{key}": float(value)
            for key, value in flatten(record).items()
            if isinstance(value, numbers.Real) and key != "epoch"
        }
        for tracker in self._trackers:
            tracker.numbers(values, epoch)

    def _show(self, tag: str, videos: np.ndarray, record: dict, on_disk: bool) -> None:
        """Send the videos to the trackers: as one captioned sheet, and each by itself if they are
        written to disk too.
        """
        epoch, texts = record["epoch"], previews.captions(record, len(videos))
        lowest, highest = (128, 256) if videos.shape[1] == 1 else (64, 128)
        sheet = previews.sheet(videos, texts, lowest, highest)
        for tracker in self._trackers:
            tracker.previews(tag, sheet, epoch)
        if on_disk:
            for shown in previews.write(self.folder / "previews", videos, texts, epoch):
                for tracker in self._trackers:
                    tracker.preview(f"{tag}/{shown.name}", shown, epoch)


class SilentLog:
    """Replaces `RunLog` in the processes that write nothing."""

    epochs = evaluations = ()

    def config(self, values: dict) -> None: ...
    def provenance(self, entry: dict) -> None: ...
    def epoch(self, record: dict) -> None: ...
    def evaluation(
        self, record: dict, videos: np.ndarray | None = None, series: int | str | None = None
    ) -> None: ...
    def close(self) -> None: ...


def warn_of_missing(folder, epoch: int) -> None:
    """Warn of records that a run lacks although its checkpoint of `epoch` includes them."""
    missing = set(range(1, epoch + 1)) - {record["epoch"] for record in read_metrics(folder)}
    if missing:
        warn(
            f"{pathlib.Path(folder, METRICS)} has no record of epoch(s) {ranges(missing)}, which "
            f"the checkpoint of epoch {epoch} contains: the run continues, but its log and report "
            "lack them"
        )
    if epoch > 0 and 0 not in [record["epoch"] for record in read_evaluations(folder)]:
        warn(
            f"{pathlib.Path(folder, EVALUATIONS)} has no evaluation of epoch 0: the report cannot "
            "compare with the model before training"
        )


def ranges(values: Iterable[int]) -> str:
    """Format whole numbers as ranges: {1, 2, 3, 7} -> '1 to 3, 7'."""
    spans = []
    for value in sorted(values):
        if spans and spans[-1][1] == value - 1:
            spans[-1][1] = value
        else:
            spans.append([value, value])
    return ", ".join(f"{first} to {last}" if last > first else str(first) for first, last in spans)


def read_metrics(folder) -> list[dict]:
    """Return the records of metrics.jsonl, oldest first; [] if there are none."""
    return _read_lines(pathlib.Path(folder, METRICS))


def read_evaluations(folder, series: int | str | None = None) -> list[dict]:
    """Return the records of evals.jsonl, oldest first; [] if there are none.

    series: length of the videos, or name of the prompts, if they are not the run's own.
    """
    return _read_lines(pathlib.Path(folder, evaluations_name(series)))


def evaluations_name(series: int | str | None) -> str:
    """Return the file name of the evaluations of videos of a length, or of named prompts; None: the
    run's own.
    """
    if series is None:
        return EVALUATIONS
    return f"evals_{series}.jsonl" if isinstance(series, str) else f"evals_{series}_frames.jsonl"


def other_series(folder) -> list[str]:
    """Return the names of a run's evaluations besides its own, e.g. "33_frames" or "long", sorted."""
    found = pathlib.Path(folder).glob("evals_*.jsonl")
    return sorted(path.stem.removeprefix("evals_") for path in found)


def read_config(folder) -> dict:
    """Return config.json; {} if it cannot be read."""
    return read_json(pathlib.Path(folder, CONFIG))


def read_starts(folder) -> list[dict]:
    """Return the entries of provenance.json, oldest first; [] if it cannot be read."""
    starts = read_json(pathlib.Path(folder, PROVENANCE)).get(STARTS)
    starts = starts if isinstance(starts, list) else []
    return [entry for entry in starts if isinstance(entry, dict)]


def read_previews(folder, epoch: int) -> np.ndarray | None:
    """Return the previews after `epoch`, uint8 [n, T, H, W, 3]; None if they cannot be read."""
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
    """Return the path of the previews of the evaluation after `epoch`."""
    return pathlib.Path(folder, "previews", f"eval_{epoch:06d}.npz")


def number(record: dict, key: str) -> float | None:
    """Return record[key] if it is a number or NaN, else None."""
    value = record.get(key)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if is_number else None


def check_evaluation(record: dict) -> None:
    """Raise ValueError unless the record has what readers of evaluations use."""
    _epoch_of(record)
    if missing := [key for key in ("reward", "low", "high", "num") if number(record, key) is None]:
        raise ValueError(f"no number under {', '.join(missing)}")
    for key, kind in (("rewards", numbers.Real), ("prompts", str), ("texts", str)):
        if not (
            isinstance(record.get(key), list)
            and all(isinstance(value, kind) for value in record[key])
            and len(record[key]) == len(record["rewards"])
        ):
            raise ValueError(f"no list of one entry per prompt under {key}")


def reward_name(record: dict) -> str:
    """Return the name of an evaluation's main reward for texts: "OCR reward", or "red reward"."""
    return f"{record['main']} reward" if "main" in record else "OCR reward"


def _epoch_of(record: dict) -> int:
    epoch = record.get("epoch")
    if isinstance(epoch, bool) or not isinstance(epoch, numbers.Integral):
        raise ValueError(f"a record needs a whole number under 'epoch', got {epoch!r}")
    return int(epoch)


def _read_lines(path: pathlib.Path) -> list[dict]:
    """Return the usable records of one of the run's .jsonl files."""
    return parse_lines(path, _epoch_of if path.name == METRICS else check_evaluation)[0]

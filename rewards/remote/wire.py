"""The wire format of videos and scores between a trainer and a reward server.

A request is a short header and the pixels as they are in memory; an answer is JSON
(docs/howto/rewards_server.md). Nothing is unpickled, and no memory is allocated for a size that the
sender only claims.

Version 1 has any JSON as the record of a video. In version 2 a record is a `PromptRecord`, a request
may be a group, whose videos are scored together, and a value may be null where a part is.
"""

import dataclasses
import json
import math
import struct
import sys
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np

from rewards.base import PromptRecord, RewardError, Score, check_frames, last_line
from rewards.batch_scores import BatchScores

SCORE_PATH, HEALTH_PATH = "/v1/score", "/v1/health"
CONTENT_TYPE = "application/x-wan-rewards"
VERSIONS = (1, 2)
MAGIC, MAGIC_2 = b"WANRWD1\n", b"WANRWD2\n"
_PREFIX = struct.Struct("<8sI")  # magic, bytes of the JSON header
# largest magnitude of a value: far above any reward, and sums of squares fit into float32
MAX_VALUE = 1e6
MAX_LEVELS = 64  # of nested arrays and objects in JSON; far below what Python's recursion allows


class WireError(ValueError):
    """A request that cannot be scored. status: the HTTP status of the answer."""

    def __init__(self, message: str, status: int = 400):
        super().__init__(message)
        self.status = status


@dataclasses.dataclass(frozen=True)
class Limits:
    """The largest request that a server accepts."""

    body: int = 512 << 20  # bytes of the whole request
    header: int = 1 << 20  # bytes of its JSON header
    videos: int = 64  # B
    frames: int = 1024  # T
    side: int = 4096  # H and W, pixels


@dataclasses.dataclass(frozen=True)
class ScoreRequest:
    """A decoded request. videos: uint8 [B, T, H, W, 3]. group: whether they are one group."""

    videos: np.ndarray
    records: list[Any]
    version: int = 1
    group: bool = False


DEFAULT_LIMITS = Limits()
# defaults of a server's limits on all requests together
MAX_QUEUE = 1024  # videos that arrive, wait or are scored
MAX_MEMORY = 4096 << 20  # bytes
UPLOAD_TIMEOUT = 60.0  # seconds for the body of a request to arrive


# --- JSON and text from other machines ------------------------------------------------------------


def load_json(text: bytes) -> Any:
    """Parse JSON. Raises `ValueError` unless it is JSON in UTF-8 with at most `MAX_LEVELS` nested
    levels, so that recursive code may follow the structure.
    """
    try:
        value = json.loads(text.decode())
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_LEVELS} levels") from None
    _check_levels(value, MAX_LEVELS)
    return value


def _check_levels(value: Any, levels: int) -> None:
    if isinstance(value, list | dict):
        if levels == 0:
            raise ValueError(f"nested deeper than {MAX_LEVELS} levels")
        for item in value.values() if isinstance(value, dict) else value:
            _check_levels(item, levels - 1)


def printable(text: str, length: int = 500) -> str:
    """Return the first `length` characters of a text on one line, without characters that control
    a terminal; for logs and messages.
    """
    return "".join(char if char.isprintable() else " " for char in text[:length]).strip()


# --- Requests -------------------------------------------------------------------------------------


def encode_request(
    videos: np.ndarray, records: Sequence[Any], version: int = 1, group: bool = False
) -> list[bytes | memoryview]:
    """Return the parts of a request's body: prefix, header and pixels, the latter without a copy.

    videos: uint8 [B, T, H, W, 3]. records: B values that JSON can represent; in version 2,
    `PromptRecord`s. group: whether the videos are scored together, which needs version 2. Raises
    `RewardError` for other records.
    """
    check_frames(videos[0])
    fields: dict[str, Any] = {"shape": videos.shape, "dtype": "uint8"}
    if group and version > 1:
        fields["group"] = True
    try:
        fields["records"] = [
            vars(record) if isinstance(record, PromptRecord) else record for record in records
        ]
        header = json.dumps(fields).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise RewardError(
            f"a record cannot be sent to a reward server ({error}): use strings, numbers, None, "
            "and lists, tuples and dicts of them"
        ) from error
    return [
        _PREFIX.pack(MAGIC if version == 1 else MAGIC_2, len(header)),
        header,
        np.ascontiguousarray(videos).data.cast("B"),
    ]


def decode_request(body: bytes | bytearray, limits: Limits) -> ScoreRequest:
    """Decode what `encode_request` encodes: the videos without a copy, the records with tuples in
    place of JSON's arrays.

    Raises `WireError` that names the value, the limit and the fix.
    """
    if len(body) < _PREFIX.size or not body.startswith((MAGIC, MAGIC_2)):
        raise WireError(
            f"the body begins with {bytes(body[:8])!r}, not with {MAGIC!r} or {MAGIC_2!r}: send the "
            "format of docs/howto/rewards_server.md, version 1 or 2",
            415,
        )
    version = 1 if body.startswith(MAGIC) else 2
    size = _PREFIX.unpack_from(body)[1]
    if size > limits.header:
        raise WireError(
            f"the header has {size} bytes, more than the limit of {limits.header}: send fewer "
            "videos in a request, or shorter records",
            413,
        )
    start = _PREFIX.size + size
    if start > len(body):
        raise WireError(
            f"the body ends within its header: {size} bytes announced, {len(body) - _PREFIX.size} "
            "there"
        )
    try:
        header = load_json(bytes(body[_PREFIX.size : start]))
    except ValueError as error:
        raise WireError(f"the header is not JSON in UTF-8: {error}") from None
    shape, records = _check_header(header, limits)
    if len(body) - start != math.prod(shape):
        raise WireError(
            f"the header's shape {list(shape)} means {math.prod(shape)} bytes of pixels, but "
            f"{len(body) - start} follow it: send uint8 in C order, nothing before or after"
        )
    videos = np.frombuffer(body, np.uint8, offset=start).reshape(shape)
    if version == 1:
        return ScoreRequest(videos, records)
    group = header.get("group", False)
    if not isinstance(group, bool):
        raise WireError(f"group {_short(group)} is neither true nor false", 422)
    return ScoreRequest(videos, [_prompt_record(record) for record in records], version, group)


def _prompt_record(record: Any) -> PromptRecord:
    """Return a record of version 2. Raises `WireError`."""
    fields = dict(record) if isinstance(record, dict) else {}
    targets = fields.setdefault("targets", ())
    fields.setdefault("metadata", {})
    fields.setdefault("fps", PromptRecord((), "").fps)
    if (
        fields.keys() != {"prompt", "targets", "metadata", "fps"}
        or not isinstance(fields["prompt"], str)
        or not isinstance(targets, tuple)
        or not all(map(_is_text, targets))
        or not isinstance(fields["metadata"], dict)
        or not _is_number(fields["fps"], sys.float_info.min)
    ):
        raise WireError(
            f'record {_short(record)} is not {{"prompt": "...", "targets": ["..."], "metadata": '
            '{...}, "fps": 16.0}, of which all but the prompt may be left out',
            422,
        )
    return PromptRecord(**fields)


def _check_header(header: Any, limits: Limits) -> tuple[tuple[int, ...], list[Any]]:
    """Return the shape and the records of a request's header. Raises `WireError`."""
    if not isinstance(header, dict) or not {"shape", "dtype", "records"} <= header.keys():
        raise WireError(
            'the header must be {"shape": [B, T, H, W, 3], "dtype": "uint8", "records": [...]}'
        )
    shape, records = header["shape"], header["records"]
    if header["dtype"] != "uint8":
        raise WireError(
            f"dtype {_short(header['dtype'])} is not accepted: send uint8 RGB, ((x + 1) * "
            "127.5).round().clip(0, 255) of x in [-1, 1]",
            422,
        )
    if (
        not isinstance(shape, list)
        or len(shape) != 5
        or shape[-1] != 3
        or not all(type(n) is int and n > 0 for n in shape)
    ):
        raise WireError(
            f"shape {_short(shape)} is not [B, T, H, W, 3] with no empty axis; an image is a video "
            f"with T = 1",
            422,
        )
    for name, value, limit in (
        ("videos", shape[0], limits.videos),
        ("frames", shape[1], limits.frames),
        ("height", shape[2], limits.side),
        ("width", shape[3], limits.side),
    ):
        if value > limit:
            raise WireError(
                f"{name} = {_short(value)} is more than the limit of {limit}: send less, or start "
                "the server with a higher limit",
                413,
            )
    if not isinstance(records, list) or len(records) != shape[0]:
        count = len(records) if isinstance(records, list) else type(records).__name__
        raise WireError(
            f"{shape[0]} videos but {count} records: give a list with one for each video", 422
        )
    return tuple(shape), [_tuples(record) for record in records]


def _tuples(value: Any) -> Any:
    """Replace JSON's arrays by tuples, which records and scores contain."""
    if isinstance(value, list):
        return tuple(_tuples(item) for item in value)
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return value


# --- Answers --------------------------------------------------------------------------------------


def encode_scores(batch: BatchScores, version: int = 1) -> bytes:
    """Encode scores as JSON, in the order of the request:
    {"scores": [{"valid": ..., "error": ..., and the fields of `Score`}, ...]}. A value that is nan
    because a part is becomes null in version 2; version 1 cannot represent it.

    Python writes each double with enough digits to read back the same double, so values arrive bit
    for bit. A score that JSON cannot represent is sent as not valid.
    """
    scores = []
    for score, error in zip(batch.scores, batch.errors):
        try:
            scores.append(_encode_score(score, last_line(error) if error else "", version))
        except (TypeError, ValueError, AttributeError, RecursionError) as reason:
            scores.append(
                _encode_score(None, f"the reward gave a score that cannot be sent: {reason}")
            )
    return f'{{"scores": [{", ".join(scores)}]}}'.encode()


def _encode_score(score: Score | None, error: str, version: int = 1) -> str:
    fields = dataclasses.asdict(score or Score(0.0))
    del fields["boxes"]  # not part of the format
    if score is None or (version > 1 and math.isnan(score.value)):
        fields["value"] = None
    fields["parts"] = [
        [name, None if math.isnan(value) else value] for name, value in fields["parts"]
    ]
    return json.dumps(
        {"valid": score is not None, "error": error, **fields},
        allow_nan=False,
        default=lambda number: number.item(),
    )


def decode_scores(
    answer: Any,
    count: int,
    frames: int,
    bounds: tuple[float, float] = (-MAX_VALUE, MAX_VALUE),
    version: int = 1,
) -> list[Score | RewardError]:
    """Decode what `encode_scores` encodes: for each of `count` videos its score, or an error.

    A score that violates the wire format, or has a value outside `bounds`, becomes an error of that
    video. frames: number of frames of each video that were sent. version: of the request. Raises
    `RewardError` where the answer does not have `count` scores.
    """
    records = answer.get("scores") if isinstance(answer, dict) else None
    if not isinstance(records, list) or len(records) != count:
        raise RewardError(f"not the scores of {count} videos: {_short(answer)}")
    return [_decode_score(record, frames, bounds, version) for record in records]


def _decode_score(
    record: Any, frames: int, bounds: tuple[float, float], version: int
) -> Score | RewardError:
    if not isinstance(record, dict) or not isinstance(record.get("valid"), bool):
        return RewardError(
            f"the server's score is malformed, expected an object with a boolean 'valid': "
            f"{_short(record)}"
        )
    if not record["valid"]:
        return RewardError(
            f"the server could not score the video: {printable(str(record.get('error')))}"
        )
    expected: dict[str, tuple[Callable[[Any], bool], str]] = {
        "value": (
            lambda value: (
                _is_number(value, *bounds) or (version > 1 and value is None and _has_null(record))
            ),
            f"a number from {bounds[0]:g} to {bounds[1]:g}",
        ),
        "text": (_is_text, "a string"),
        "frames": (
            lambda value: _is_list(value, lambda i: type(i) is int and 0 <= i < frames),
            f"integers from 0 to {frames - 1}",
        ),
        "frame_values": (lambda value: _is_list(value, _is_number), "finite numbers"),
        "frame_texts": (lambda value: _is_list(value, _is_text), "strings"),
        "parts": (
            lambda value: _is_list(value, _is_part),
            f"[name, number from {-MAX_VALUE:g} to {MAX_VALUE:g} or null] each",
        ),
    }
    fields: dict[str, Any] = {"value": None} | {
        name: record[name] for name in expected if name in record
    }
    for name, value in fields.items():
        is_valid, description = expected[name]
        if not is_valid(value):
            return RewardError(
                f"the server's score is malformed, {name}={_short(value)}: expected {description}"
            )
    fields["parts"] = [
        (name, math.nan if value is None else value) for name, value in fields.get("parts", ())
    ]
    fields["value"] = math.nan if fields["value"] is None else fields["value"]
    return Score(**{name: _tuples(value) for name, value in fields.items()})


def _has_null(record: dict) -> bool:
    """Return whether some but not all parts of a score are null, so that its value may be."""
    parts = record.get("parts")
    if not _is_list(parts, _is_part):
        return False
    failed = [value is None for _, value in cast(list, parts)]
    return any(failed) and not all(failed)


def _short(value: Any) -> str:
    """Return the beginning of a value's repr, for messages."""
    return repr(value)[:200]


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(
    value: Any, low: float = -sys.float_info.max, high: float = sys.float_info.max
) -> bool:
    return type(value) in (int, float) and low <= value <= high  # False for nan and for bool


def _is_list(value: Any, is_item: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(is_item, value))


def _is_part(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and _is_text(value[0])
        and (value[1] is None or _is_number(value[1], -MAX_VALUE, MAX_VALUE))
    )

"""How videos and scores travel between a trainer and a reward server (docs/rewards_server.md).

A request is a short header and the pixels as they lie in memory; an answer is JSON. Nothing is ever unpickled, and
nothing is allocated by a size that the sender only claims.
"""

import dataclasses
import json
import math
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from rewards.base import RewardError, Score, check_frames
from rewards.workers import BatchScores

SCORE_PATH, HEALTH_PATH = "/v1/score", "/v1/health"
CONTENT_TYPE = "application/x-wan-rewards"
MAGIC = b"WANRWD1\n"
_PREFIX = struct.Struct("<8sI")  # magic, bytes of the JSON header
_FIELDS = tuple(field.name for field in dataclasses.fields(Score))


class WireError(ValueError):
    """A request that cannot be scored as it is; `status` is the HTTP status that says so."""

    def __init__(self, message: str, status: int = 400):
        super().__init__(message)
        self.status = status


@dataclasses.dataclass(frozen=True)
class Limits:
    """The largest request that a server takes."""

    body: int = 512 << 20       # bytes of the whole request
    header: int = 1 << 20       # bytes of its JSON header
    videos: int = 64            # B
    frames: int = 1024          # T
    side: int = 4096            # H and W, pixels


DEFAULT_LIMITS = Limits()


# --- requests -----------------------------------------------------------------------------------------------

def encode_request(videos: np.ndarray, records: Sequence[Any]) -> list[bytes | memoryview]:
    """The parts of a request's body. `videos` uint8 [B, T, H, W, 3]; `records` B of what JSON can hold.

    Raises RewardError for a record that JSON cannot hold: pickle would, and is not an option.
    """
    check_frames(videos[0])
    try:
        header = json.dumps({"shape": videos.shape, "dtype": "uint8", "records": list(records)}).encode()
    except (TypeError, ValueError) as error:
        raise RewardError(f"a record cannot be sent to a reward server ({error}): use strings, numbers, None, and "
                          f"lists, tuples and dicts of them") from error
    return [_PREFIX.pack(MAGIC, len(header)), header, memoryview(np.ascontiguousarray(videos)).cast("B")]


def decode_request(body: bytes | bytearray, limits: Limits) -> tuple[np.ndarray, list[Any]]:
    """`encode_request` backwards: (uint8 [B, T, H, W, 3] without a copy, B records with tuples for arrays).

    Raises WireError, naming the value, the limit and the fix.
    """
    if len(body) < _PREFIX.size or not body.startswith(MAGIC):
        raise WireError(f"the body begins with {bytes(body[:8])!r}, not with {MAGIC!r}: send the format of "
                        f"docs/rewards_server.md, version 1", 415)
    size = _PREFIX.unpack_from(body)[1]
    if size > limits.header:
        raise WireError(f"the header has {size} bytes, more than the limit of {limits.header}: send fewer videos in a "
                        f"request, or shorter records", 413)
    start = _PREFIX.size + size
    if start > len(body):
        raise WireError(f"the body ends within its header: {size} bytes announced, {len(body) - _PREFIX.size} there")
    try:
        header = json.loads(bytes(body[_PREFIX.size:start]))
    except (ValueError, RecursionError) as error:
        raise WireError(f"the header is not JSON in UTF-8: {error}") from None
    shape, records = _checked(header, limits)
    if len(body) - start != math.prod(shape):
        raise WireError(f"the header's shape {list(shape)} means {math.prod(shape)} bytes of pixels, but "
                        f"{len(body) - start} follow it: send uint8 in C order, nothing before or after")
    return np.frombuffer(body, np.uint8, offset=start).reshape(shape), records


def _checked(header: Any, limits: Limits) -> tuple[tuple[int, ...], list[Any]]:
    if not isinstance(header, dict) or not {"shape", "dtype", "records"} <= header.keys():
        raise WireError('the header must be {"shape": [B, T, H, W, 3], "dtype": "uint8", "records": [...]}')
    shape, records = header["shape"], header["records"]
    if header["dtype"] != "uint8":
        raise WireError(f"dtype {header['dtype']!r} is not taken: send uint8 RGB, ((x + 1) * 127.5).round().clip(0, "
                        f"255) of x in [-1, 1]", 422)
    if (not isinstance(shape, list) or len(shape) != 5 or shape[-1] != 3
            or not all(type(n) is int and n > 0 for n in shape)):
        raise WireError(f"shape {shape!r} is not [B, T, H, W, 3] with no empty axis; an image is a video with T = 1",
                        422)
    for name, value, limit in (("videos", shape[0], limits.videos), ("frames", shape[1], limits.frames),
                               ("height", shape[2], limits.side), ("width", shape[3], limits.side)):
        if value > limit:
            raise WireError(f"{name} = {value} is more than the limit of {limit}: send less, or start the server with "
                            f"a higher limit", 413)
    if not isinstance(records, list) or len(records) != shape[0]:
        found = len(records) if isinstance(records, list) else type(records).__name__
        raise WireError(f"{shape[0]} videos but {found} records: give a list with one for each video", 422)
    return tuple(shape), [_tuples(record) for record in records]


def _tuples(value: Any) -> Any:
    """JSON's arrays as tuples, which is what records and scores hold."""
    if isinstance(value, list):
        return tuple(_tuples(item) for item in value)
    return {key: _tuples(item) for key, item in value.items()} if isinstance(value, dict) else value


# --- answers ------------------------------------------------------------------------------------------------

def encode_scores(batch: BatchScores) -> bytes:
    """JSON: {"scores": [{"valid", "error", and the fields of `Score`} ...]}, in the order of the request.

    Python writes a double with the digits that give the same double back, so values arrive bit for bit.
    """
    nothing = dataclasses.asdict(Score(0.0)) | {"value": None}
    scores = [{"valid": score is not None, "error": error.strip().splitlines()[-1] if error else "",
               **(dataclasses.asdict(score) if score else nothing)}
              for score, error in zip(batch.scores, batch.errors)]
    return json.dumps({"scores": scores}, default=lambda number: number.item()).encode()


def decode_scores(answer: Any, count: int) -> list[Score | RewardError]:
    """`encode_scores` backwards: for each of `count` videos its score, or why it has none.

    Raises RewardError for anything else than such an answer.
    """
    try:
        scores = [Score(**{name: _tuples(item[name]) for name in _FIELDS if name in item}) if item["valid"]
                  else RewardError(f"the server could not score the video: {item['error']}")
                  for item in answer["scores"]]
        if len(scores) == count and all(isinstance(s, RewardError) or isinstance(s.value, int | float) for s in scores):
            return scores
    except (KeyError, TypeError):
        pass
    raise RewardError(f"not the scores of {count} videos: {str(answer)[:200]}")

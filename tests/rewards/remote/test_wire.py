"""The wire format: what is encoded is decoded to the bit, and what is malformed is refused."""

import json
import math
import pickle
import struct
import sys

import numpy as np
import pytest

from rewards.base import PromptRecord, RewardError, Score
from rewards.batch_scores import BatchScores
from rewards.remote.wire import (
    MAGIC,
    MAGIC_2,
    Limits,
    WireError,
    decode_request,
    decode_scores,
    encode_request,
    encode_scores,
)

VIDEOS = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 5, 3), np.uint8)
RECORDS = [("OPEN", "早安"), {"targets": ("A",), "weight": 0.1, "none": None}]


def framed(header, pixels=b""):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<8sI", MAGIC, len(header)) + header + pixels


def body_of(**changes):
    return framed(
        {"shape": [2, 3, 4, 5, 3], "dtype": "uint8", "records": [["A"], ["B"]]} | changes,
        VIDEOS.tobytes(),
    )


def nested(name, depth):
    """A request with `depth` nested arrays as `name`."""
    header = {"shape": [2, 3, 4, 5, 3], "dtype": "uint8", "records": [["A"], ["B"]]} | {
        name: "HERE"
    }
    return framed(
        json.dumps(header).replace('"HERE"', "[" * depth + "]" * depth).encode(), VIDEOS.tobytes()
    )


def test_a_request_arrives_as_it_was_sent():
    for videos in (VIDEOS, VIDEOS[:, :, ::-1, 1:4]):  # also without a contiguous memory
        decoded = decode_request(b"".join(encode_request(videos, RECORDS)), Limits())
        assert decoded.videos.dtype == np.uint8 and np.array_equal(decoded.videos, videos)
        assert decoded.records == RECORDS and (decoded.version, decoded.group) == (1, False)


def test_pixels_are_not_copied():
    body = b"".join(encode_request(VIDEOS, RECORDS))
    assert np.shares_memory(decode_request(body, Limits()).videos, np.frombuffer(body, np.uint8))
    assert np.shares_memory(np.frombuffer(encode_request(VIDEOS, RECORDS)[2], np.uint8), VIDEOS)


def test_scores_arrive_bit_for_bit():
    third, tiny = 1 / 3, math.ulp(0.0)
    scores = [
        Score(
            third,
            'a "quoted" | ü \ud800 早',
            (0, 4),
            (tiny, sys.float_info.max),
            ("x", ""),
            (("ocr", third), ("flicker", 0.0)),
        ),
        None,
        Score(
            np.float64(0.1) + np.float64(0.2),
            frames=(np.int64(3),),
            frame_values=(np.float64(third),),
        ),
    ]
    values = np.array([s.value if s else np.nan for s in scores])
    errors = ["", "Traceback\n  line 1\nValueError: why\n", ""]
    batch = BatchScores(
        values, ~np.isnan(values), [], {}, scores, errors, failures=1, retries=1, seconds=0.0
    )
    got = decode_scores(json.loads(encode_scores(batch)), 3, 5)
    assert got[0] == scores[0] and got[2] == scores[2] and type(got[2].value) is float
    assert isinstance(got[1], RewardError) and str(got[1]).endswith("ValueError: why")


def test_a_record_that_json_cannot_hold_is_refused():
    with pytest.raises(RewardError, match=r"cannot be sent.*set"):
        encode_request(VIDEOS, [{"A"}, "B"])
    cycle = []
    cycle.append(cycle)
    with pytest.raises(RewardError, match=r"cannot be sent"):
        encode_request(VIDEOS, [cycle, "B"])


@pytest.mark.parametrize(
    "answer",
    [
        None,
        [],
        {},
        {"scores": 3},
        {"scores": []},
        {"scores": {"0": {}}},
        {"scores": [{"valid": True, "value": 1.0}] * 2},
    ],
)
def test_answers_of_another_kind_are_refused(answer):
    with pytest.raises(RewardError, match="not the scores of 1 videos"):
        decode_scores(answer, 1, 9)


@pytest.mark.parametrize(
    "name, value",
    [
        *[
            ("value", value)
            for value in (None, "1", [1.0], {}, True, math.nan, math.inf, 1e308, -7, 1.01, 10**400)
        ],
        *[
            ("parts", value)
            for value in (
                5,
                None,
                "ab",
                {"a": 1},
                ["ab"],
                [["a", 1, 2]],
                [["a"]],
                [["x", "abc"]],
                [[1, 1]],
                [["x", True]],
                [["x", math.nan]],
                [["x", math.inf]],
                [["x", 1e308]],
            )
        ],
        *[("frames", value) for value in (3, None, ["0"], [0.0], [True], [9], [-1], [[0]])],
        *[("frame_values", value) for value in (3, ["0"], [math.nan], [None], [10**400])],
        *[("frame_texts", value) for value in ("abc", [1], [["a"]])],
        *[("text", value) for value in (1, None, ["a"], {})],
        *[("valid", value) for value in (1, None, "yes")],
    ],
)
def test_a_malformed_score_concerns_its_video_alone(name, value):
    good = {"valid": True, "value": 0.5, "parts": [["x", None], ["y", 3]], "frames": [8]}
    malformed, other = decode_scores({"scores": [good | {name: value}, good]}, 2, 9, (0.0, 1.0))
    assert (
        isinstance(malformed, RewardError) and name in str(malformed) and len(str(malformed)) < 400
    )
    assert (other.value, other.frames, other.parts[1]) == (0.5, (8,), ("y", 3)) and math.isnan(
        other.parts[0][1]
    )


@pytest.mark.parametrize(
    "record", [None, 3, [], "a", {}, {"valid": True}, {"valid": False, "error": {}}]
)
def test_a_missing_score_concerns_its_video_alone(record):
    assert isinstance(decode_scores({"scores": [record]}, 1, 9)[0], RewardError)


@pytest.mark.parametrize(
    "score",
    [
        Score(0.5, text=pickle),
        Score(0.5, frame_values=(math.nan,)),
        Score(object()),
        Score(0.5, parts=(("x", "abc"),)),
        Score(0.5, parts=(("x",),)),
    ],
)
def test_a_score_that_cannot_be_sent_is_not_valid(score):
    batch = BatchScores(
        np.zeros(2), np.ones(2, bool), [], {}, [score, Score(0.5)], ["", ""], 0, 0, 0.0
    )
    answer = json.loads(encode_scores(batch))
    assert [record["valid"] for record in answer["scores"]] == [False, True]
    assert "cannot be sent" in answer["scores"][0]["error"]


@pytest.mark.parametrize(
    "body, status, message",
    [
        (b"", 415, "begins with b''"),
        (pickle.dumps(VIDEOS), 415, "docs/howto/rewards_server.md"),
        (b"PK\x03\x04 an npz file", 415, "begins with b'PK"),
        (MAGIC, 415, "begins with"),
        (struct.pack("<8sI", MAGIC, 100) + b"{}", 400, "100 bytes announced, 2 there"),
        (struct.pack("<8sI", MAGIC, 2**31), 413, "limit of 1048576"),
        (framed(b"{"), 400, "not JSON"),
        (framed(b"\xff\xfe"), 400, "not JSON"),
        (framed(b"[" * 100_000), 400, "not JSON"),
        (framed(pickle.dumps({"shape": [1]})), 400, "not JSON"),
        *[
            (nested(name, depth), 400, "deeper than 64 levels" if depth < 900 else "not JSON")
            for depth in (64, 600, 990)
            for name in ("records", "shape", "dtype", "more")
        ],
        (framed(b'{"shape": [%s, 1, 1, 1, 3]}' % (b"1" * 5000)), 400, "not JSON"),
        (framed([1, 2]), 400, "must be"),
        (framed({"shape": [1, 1, 1, 1, 3]}), 400, "must be"),
        (body_of(dtype="float32"), 422, "'float32' is not accepted"),
        (body_of(dtype="object"), 422, "send uint8"),
        (body_of(dtype="x" * 100_000), 422, "is not accepted"),
        (body_of(dtype="\ud800"), 422, "is not accepted"),
        (body_of(shape=[1] * 100_000), 422, "is not"),
        (body_of(shape=[3, 4, 5, 3]), 422, "is not"),
        (body_of(shape=[2, 3, 4, 5, 4]), 422, "is not"),
        (body_of(shape=[0, 3, 4, 5, 3]), 422, "no empty axis"),
        (body_of(shape=[2, 3, 4, -5, 3]), 422, "no empty axis"),
        (body_of(shape=[2, 3, 4, 5.0, 3]), 422, "is not"),
        (body_of(shape=[True, 3, 4, 5, 3]), 422, "is not"),
        (body_of(shape="2,3,4,5,3"), 422, "is not"),
        (body_of(shape=[65, 1, 1, 1, 3]), 413, "videos = 65 is more than the limit of 64"),
        (body_of(shape=[2, 2000, 4, 5, 3]), 413, "frames = 2000"),
        (body_of(shape=[2, 3, 10**30, 5, 3]), 413, "height = 1"),
        (body_of(shape=[2, 3, 4, 4097, 3]), 413, "width = 4097 is more than the limit of 4096"),
        (body_of(records=[["A"]]), 422, "2 videos but 1 records"),
        (body_of(records="AB"), 422, "2 videos but str records"),
        (body_of()[:-1], 400, "360 bytes of pixels, but 359 follow"),
        (body_of() + b"x", 400, "but 361 follow"),
    ],
)
def test_malformed_requests(body, status, message):
    with pytest.raises(WireError, match=message.replace("(", r"\(")) as error:
        decode_request(body, Limits())
    assert error.value.status == status and len(str(error.value)) < 400


# --- Version 2 ------------------------------------------------------------------------------------

ASKED = [
    PromptRecord(("OPEN", "早安"), "a sign", {"id": 7, "list": (1, None)}, 24.0),
    PromptRecord((), "nothing to read"),
]


@pytest.mark.parametrize("group", [False, True])
def test_a_request_of_version_2_has_the_whole_record(group):
    decoded = decode_request(b"".join(encode_request(VIDEOS, ASKED, 2, group)), Limits())
    assert decoded.records == ASKED and (decoded.version, decoded.group) == (2, group)
    assert np.array_equal(decoded.videos, VIDEOS)
    old = decode_request(b"".join(encode_request(VIDEOS, ASKED, 1, group)), Limits())
    assert (old.version, old.group, old.records[0]) == (1, False, vars(ASKED[0]))


def body_of_2(**changes):
    fields = {"shape": [2, 3, 4, 5, 3], "dtype": "uint8", "records": [{"prompt": "a"}] * 2}
    header = json.dumps(fields | changes).encode()
    return struct.pack("<8sI", MAGIC_2, len(header)) + header + VIDEOS.tobytes()


def test_all_but_the_prompt_may_be_left_out():
    assert decode_request(body_of_2(), Limits()).records == [PromptRecord((), "a")] * 2


@pytest.mark.parametrize(
    "record",
    [
        ["OPEN"],
        {},
        {"prompt": 1},
        {"prompt": "a", "targets": "OPEN"},
        {"prompt": "a", "targets": [1]},
        {"prompt": "a", "metadata": []},
        {"prompt": "a", "fps": 0},
        {"prompt": "a", "fps": None},
        {"prompt": "a", "other": 1},
    ],
)
def test_malformed_records_of_version_2_are_refused(record):
    with pytest.raises(WireError) as error:
        decode_request(body_of_2(records=[record, {"prompt": "a"}]), Limits())
    assert error.value.status == 422 and len(str(error.value)) < 500
    with pytest.raises(WireError, match="group"):
        decode_request(body_of_2(group=1), Limits())


def test_a_value_may_be_missing_with_a_part_in_version_2():
    score = Score(math.nan, parts=(("a", math.nan), ("b", 1.0)))
    batch = BatchScores(np.array([math.nan]), np.array([False]), [""], {}, [score], [""], 1, 0, 0.0)
    sent = {version: json.loads(encode_scores(batch, version)) for version in (1, 2)}
    (got,) = decode_scores(sent[2], 1, 9, version=2)
    assert math.isnan(got.value) and dict(got.parts)["b"] == 1.0
    assert math.isnan(dict(got.parts)["a"])
    assert isinstance(decode_scores(sent[2], 1, 9)[0], RewardError)  # not in version 1
    assert sent[1]["scores"][0]["valid"] is False
    for parts in ([], [["a", None]], [["a", 1]]):
        answer = {"scores": [{"valid": True, "value": None, "parts": parts}]}
        assert isinstance(decode_scores(answer, 1, 9, version=2)[0], RewardError)

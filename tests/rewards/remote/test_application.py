"""The application over real HTTP: who may send requests, which requests it accepts, and when it is
busy.
"""

import json
import pickle
import socket
import struct
import threading
import urllib.parse

import numpy as np
import pytest

from tests.rewards import pool_rewards
from tests.rewards.serving import BODY, TOKEN, VIDEOS, ask, serving, wait_for

pytest.importorskip("fastapi")

from rewards.remote.wire import CONTENT_TYPE, Limits, encode_request


@pytest.fixture(scope="module")
def url():
    with serving(limits=Limits(body=100_000, videos=3)) as url:
        yield url


def test_scores(url):
    status, content, _ = ask(url)
    expected = [pool_rewards.Brightness().score(video, None) for video in VIDEOS]
    assert status == 200 and [score["value"] for score in content["scores"]] == [
        score.value for score in expected
    ]
    assert content["scores"][0] == {
        "valid": True,
        "error": "",
        "value": expected[0].value,
        "text": expected[0].text,
        "frames": [],
        "frame_values": [],
        "frame_texts": [],
        "parts": [],
    }


def test_health(url):
    status, health, _ = ask(url, "GET", "/v1/health")
    assert status == 200 and health["reward"] == {"name": "brightness"} and health["workers"] == 2
    assert health["queue"] == 0 and health["limits"]["videos"] == 3
    assert {"python", "numpy", "rapidocr", "onnxruntime"} <= health["versions"].keys()


@pytest.mark.parametrize("method, path", [("POST", "/v1/score"), ("GET", "/v1/health")])
@pytest.mark.parametrize("token", ["", "wrong", TOKEN + "x", TOKEN[:-1], "\xe9"])
def test_a_wrong_token_is_refused(url, method, path, token):
    status, content, headers = ask(url, method, path, token=token)
    assert status == 401 and "Authorization: Bearer TOKEN" in content["detail"]
    assert headers["WWW-Authenticate"] == "Bearer" and TOKEN not in json.dumps(content)


def test_another_scheme_is_refused(url):
    assert ask(url, Authorization=f"Basic {TOKEN}")[0] == 401


@pytest.mark.parametrize(
    "body, headers, status, message",
    [
        (pickle.dumps((VIDEOS, ["a", "b"])), {}, 415, "begins with"),
        (
            pickle.dumps((VIDEOS, ["a", "b"])),
            {"Content_Type": "application/python-pickle"},
            415,
            "is not accepted",
        ),
        (BODY, {"Content_Type": "application/json"}, 415, "is not accepted"),
        (BODY[:-1], {}, 400, "bytes of pixels"),
        (
            b"".join(encode_request(VIDEOS[[0] * 4], ["a"] * 4)),
            {},
            413,
            "videos = 4 is more than the limit of 3",
        ),
        (bytes(100_001), {}, 413, "100001 bytes, more than the limit of 100000"),
        (bytes(20_000_000), {}, 413, "20000000 bytes"),  # far more than fits into socket buffers
        (bytes(20_000_000), {"Authorization": "Bearer no"}, 401, "Bearer"),
        (
            (bytes(1000) for _ in range(101)),
            {},
            413,
            "limit of 100000",
        ),  # chunks: announces no size
    ],
)
def test_what_is_not_taken(url, body, headers, status, message):
    code, content, _ = ask(url, body=body, **headers)
    assert code == status and message in content["detail"]
    assert ask(url)[0] == 200


def test_a_pickle_is_never_loaded(url, tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "opened"), "w"))

    trap = pickle.dumps(Trap())
    for body in (trap, BODY[:8] + struct.pack("<I", len(trap)) + trap):
        assert ask(url, body=body)[0] in (400, 415)
    assert not (tmp_path / "opened").exists()


def test_a_video_that_cannot_be_judged_fails_alone(tmp_path):
    videos = np.stack([np.full((2, 2, 2, 3), value, np.uint8) for value in (0, 1, 2)])
    with serving(lambda: pool_rewards.Mean(str(tmp_path))) as url:
        status, content, _ = ask(url, body=b"".join(encode_request(videos, ["a", "b", "c"])))
    assert status == 200 and [score["valid"] for score in content["scores"]] == [True, False, True]
    assert content["scores"][1]["error"] == "ValueError: this video cannot be judged"
    assert content["scores"][1]["value"] is None and content["scores"][2]["value"] == 2


def test_a_full_queue_asks_to_come_back(url):
    results = []
    with serving(pool_rewards.Slow, workers=1, max_queue=2) as url:
        thread = threading.Thread(target=lambda: results.append(ask(url)))
        thread.start()
        wait_for(lambda: ask(url, "GET", "/v1/health")[1]["queue"] == 2)
        status, content, headers = ask(url)
        thread.join()
    assert status == 503 and headers["Retry-After"] == "1" and "limit of 2" in content["detail"]
    assert results[0][0] == 200


@pytest.mark.slow
def test_the_work_of_a_client_that_left_is_dropped():
    with serving(pool_rewards.Slow, workers=1) as url:
        parts = urllib.parse.urlsplit(url)
        body = b"".join(encode_request(VIDEOS[[0] * 20], ["a"] * 20))  # 10 s of work
        with socket.create_connection((parts.hostname, parts.port)) as sock:
            sock.sendall(
                f"POST /v1/score HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {TOKEN}\r\n"
                f"Content-Type: {CONTENT_TYPE}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
                + body
            )
            wait_for(lambda: ask(url, "GET", "/v1/health")[1]["queue"] == 20)
        wait_for(lambda: ask(url, "GET", "/v1/health")[1]["queue"] == 0)

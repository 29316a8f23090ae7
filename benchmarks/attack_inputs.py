"""Inputs for `benchmarks.server_attacks`: requests that a reward server must refuse, and answers that
a client must not take for a score.
"""

import json
import random
import struct

import numpy as np

from rewards.remote.wire import CONTENT_TYPE, MAGIC, encode_request

TOKEN = "a-token-for-attacks"
VIDEOS = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 5, 3), np.uint8)
BODY = b"".join(encode_request(VIDEOS, [["a"], ["b"]]))
HEALTH = {"reward": {"name": "ocr"}, "versions": {}, "workers": 1}


# --- Requests -------------------------------------------------------------------------------------


def head(
    *lines: str, length: int | None = None, method: str = "POST /v1/score", token: str = TOKEN
) -> bytes:
    """Return the header of a request. lines: further lines of it."""
    size = [] if length is None else [f"Content-Length: {length}"]
    return "\r\n".join(
        [
            f"{method} HTTP/1.1",
            "Host: a",
            f"Authorization: Bearer {token}",
            f"Content-Type: {CONTENT_TYPE}",
            *size,
            *lines,
            "",
            "",
        ]
    ).encode("latin-1")


def whole(body: bytes, *lines: str, **changes) -> bytes:
    """Return a request with `body`. changes: arguments of `head`."""
    return head(*lines, length=len(body), **changes) + body


def framed(header: bytes, pixels: bytes = VIDEOS.tobytes()) -> bytes:
    """Return a body in the wire format with `header` as its JSON header."""
    return struct.pack("<8sI", MAGIC, len(header)) + header + pixels


def header_with(**changes) -> bytes:
    """Return the JSON header of a good request with some keys changed."""
    return json.dumps(
        {"shape": VIDEOS.shape, "dtype": "uint8", "records": [["a"], ["b"]]} | changes
    ).encode()


def malformed_http() -> list[tuple[str, bytes]]:
    """Return requests that are not HTTP, or that the server's two paths do not accept."""
    chunked = head("Transfer-Encoding: chunked")
    return [
        ("garbage", b"\x00\xff\x00garbage\r\n\r\n"),
        ("TLS greeting", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 9),
        ("HTTP/2 preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
        ("HTTP/0.9", b"GET /v1/health\r\n\r\n"),
        ("HTTP/9.9", b"GET / HTTP/9.9\r\nHost: a\r\n\r\n"),
        ("no host", b"GET /v1/health HTTP/1.1\r\n\r\n"),
        ("two hosts", head("Host: b", length=0)),
        ("long header", head("A: " + "b" * 70_000)),
        ("many headers", head(*(f"A{n}: {'b' * 50}" for n in range(2000)))),
        ("long path", head(method="GET /" + "a" * 70_000)),
        ("null in a header", head("A: b\x00c")),
        ("folded header", head("A: b", " folded", "\tmore", length=0)),
        ("space before the colon", head("A : b")),
        ("no colon", head("A")),
        ("bare line feeds", head().replace(b"\r", b"")),
        ("smuggling", head("Transfer-Encoding: chunked", length=5) + b"0\r\n\r\n"),
        ("two lengths", head("Content-Length: 6", length=5) + b"12345"),
        ("negative length", head("Content-Length: -1")),
        ("length of words", head("Content-Length: ten")),
        ("length with a plus", head("Content-Length: +5") + b"12345"),
        ("length of 5000 digits", head("Content-Length: " + "9" * 5000)),
        ("length of 20 digits", head("Content-Length: " + "9" * 20)),
        ("length of 2^63", head(length=1 << 63)),
        ("no length", head()),
        ("empty body", head(length=0)),
        ("unknown coding", head("Transfer-Encoding: gzip")),
        ("chunk of xyz", chunked + b"xyz\r\n"),
        ("negative chunk", chunked + b"-5\r\nabc"),
        ("chunk of 2^64", chunked + b"10000000000000000\r\n"),
        ("chunk without its end", chunked + b"1\r\nabc\r\n"),
        ("long chunk extension", chunked + b"1;" + b"a" * 70_000 + b"\r\n"),
        ("empty chunks", chunked + b"0\r\n\r\n"),
        ("gzip", whole(BODY, "Content-Encoding: gzip", method="POST /v1/scores")),
        ("websocket", head("Upgrade: websocket", "Connection: Upgrade", method="GET /v1/score")),
        ("expect", whole(b"x", "Expect: 100-continue")),
        ("unknown expectation", whole(b"x", "Expect: 200-maybe")),
        ("path upwards", head(method="GET /v1/../../etc/passwd")),
        ("encoded path", head(method="GET /%00%ff%2e%2e%2f")),
        ("whole URL", head(method="GET http://other/v1/none")),
        ("options", head(method="OPTIONS *")),
        *(
            (method, head(method=f"{method} /v1/score", length=0))
            for method in ("GET", "PUT", "DELETE", "PATCH", "TRACE", "HEAD", "CONNECT", "A" * 300)
        ),
        *(
            (
                f"type {kind}",
                head(length=5).replace(CONTENT_TYPE.encode(), kind.encode("latin-1")) + b"12345",
            )
            for kind in (
                "text/plain",
                "application/json",
                "",
                ";",
                "\xff",
                "a" * 10_000,
                "application/python-pickle",
            )
        ),
    ]


def malformed_bodies() -> list[tuple[str, bytes]]:
    """Return bodies that are not in the wire format."""
    nested = [
        (
            f"{name} nested {depth} deep",
            framed(header_with(**{name: "HERE"}).replace(b'"HERE"', b"[" * depth + b"]" * depth)),
        )
        for depth in (65, 600, 990, 100_000)
        for name in ("records", "shape", "more")
    ]
    objects = [
        (
            f"objects nested {depth} deep",
            framed(
                header_with(records="HERE").replace(
                    b'"HERE"', b'[{"a":' * depth + b"1" + b"}]" * depth
                )
            ),
        )
        for depth in (40, 300)
    ]
    shapes = [
        (f"shape {shape!r:.40}", framed(header_with(shape=shape)))
        for shape in (
            None,
            5,
            "2,3,4,5,3",
            [],
            [2],
            [2, 3, 4, 5],
            [2, 3, 4, 5, 4],
            [2, 3, 4, 5, 3, 1],
            [0, 3, 4, 5, 3],
            [-2, 3, 4, 5, 3],
            [2, -3, -4, 5, 3],
            [2.0, 3, 4, 5, 3],
            [True, 3, 4, 5, 3],
            ["2", 3, 4, 5, 3],
            [65, 3, 4, 5, 3],
            [2, 2000, 4, 5, 3],
            [2, 3, 10**30, 5, 3],
            [2, 3, 4, 4097, 3],
            [2**63, 3, 4, 5, 3],
            [[2], 3, 4, 5, 3],
            {"0": 2},
            [2] * 10_000,
        )
    ]
    return [
        *nested,
        *objects,
        *shapes,
        ("empty", b""),
        ("magic alone", MAGIC),
        ("pickle", b"\x80\x04\x95" + bytes(50)),
        ("npz", b"PK\x03\x04" + bytes(50)),
        ("another version", b"WANRWD3\n" + BODY[8:]),
        ("cut in the header", BODY[:30]),
        ("a byte less", BODY[:-1]),
        ("a byte more", BODY + b"x"),
        ("header of 4 GiB", struct.pack("<8sI", MAGIC, 2**32 - 1)),
        ("header longer than the body", struct.pack("<8sI", MAGIC, 1000) + b"{}"),
        ("header of nothing", framed(b"")),
        ("header of zeros", framed(bytes(100))),
        ("not UTF-8", framed(b"\xff\xfe{}")),
        ("UTF-16", framed("{}".encode("utf-16"))),
        ("byte order mark", framed(b"\xef\xbb\xbf" + header_with())),
        ("half JSON", framed(header_with()[:-1])),
        ("two JSON objects", framed(header_with() * 2)),
        ("list", framed(b"[1, 2]")),
        ("number", framed(b"1e999")),
        ("string", framed(b'"a"')),
        ("null", framed(b"null")),
        ("number of 5000 digits", framed(b"9" * 5000)),
        ("key missing", framed(b'{"shape": [2, 3, 4, 5, 3]}')),
        ("NaN as records", framed(header_with(records=float("nan")))),
        *(
            (f"dtype {dtype!r:.20}", framed(header_with(dtype=dtype)))
            for dtype in (
                "float32",
                "object",
                "\ud800",
                "x" * 100_000,
                None,
                1,
                ["uint8"],
                {"a": 1},
            )
        ),
        *(
            (f"records {records!r:.20}", framed(header_with(records=records)))
            for records in (None, "ab", {}, [], [["a"]], [["a"]] * 3, 5, True)
        ),
    ]


def mutated_bodies(count: int, seed: int) -> list[tuple[str, bytes]]:
    """Return `count` good bodies with random bytes of the header changed, removed, repeated or
    inserted.
    """
    rng, bodies = random.Random(seed), []
    for number in range(count):
        body = bytearray(BODY)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(BODY) - VIDEOS.nbytes)
            kind, data = rng.randrange(4), rng.randbytes(rng.randint(1, 8))
            if kind == 0:
                body[at] ^= 1 << rng.randrange(8)
            elif kind == 1:
                del body[at : at + len(data)]
            else:
                body[at : at + (len(data) if kind == 2 else 0)] = rng.choice(
                    (data, body[at : at + 8], b"[", b"{", b'"', b"\\")
                )
        bodies.append((f"mutation {number}", bytes(body)))
    return bodies


# --- Answers --------------------------------------------------------------------------------------

GOOD = {
    "valid": True,
    "error": "",
    "value": 0.5,
    "text": "",
    "frames": [],
    "frame_values": [],
    "frame_texts": [],
    "parts": [],
}
BIG = 10**400
BAD_FIELDS = [
    *(
        ("value", value)
        for value in (
            None,
            "1",
            [1],
            {},
            True,
            float("nan"),
            float("inf"),
            -float("inf"),
            1e308,
            -7,
            1.5,
            BIG,
        )
    ),
    *(
        ("parts", value)
        for value in (
            None,
            5,
            "ab",
            {},
            [5],
            ["ab"],
            [["a", 1, 2]],
            [["a"]],
            [["x", "abc"]],
            [[1, 1]],
            [["x", True]],
            [["x", float("nan")]],
            [["x", 1e308]],
            [["x", BIG]],
        )
    ),
    *(
        ("frames", value)
        for value in (None, 5, "0", ["0"], [0.5], [True], [-1], [99], [BIG], [[0]])
    ),
    *(("frame_values", value) for value in (None, 5, ["a"], [None], [float("nan")], [BIG])),
    *(("frame_texts", value) for value in (None, 5, "abc", [1])),
    *(("text", value) for value in (None, 5, ["a"])),
    *(("valid", value) for value in (None, 1, "yes", [])),
]


def http_answer(content: object, status: int = 200) -> bytes:
    """Return an HTTP answer with `content`: bytes as they are, anything else as JSON."""
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    return b"HTTP/1.1 %d x\r\nContent-Length: %d\r\n\r\n" % (status, len(body)) + body


def bad_answers() -> list[tuple[str, bytes, bytes]]:
    """Return (name, answer to POST /v1/score, bytes that the server then sends again and again) of
    answers that contain no score.
    """
    ok, nested = b"HTTP/1.1 200 OK\r\n", b"[" * 600 + b"]" * 600
    chunked = ok + b"Transfer-Encoding: chunked\r\n\r\n"
    return [
        *(
            (f"{name}={value!r:.30}", http_answer({"scores": [GOOD | {name: value}]}), b"")
            for name, value in BAD_FIELDS
        ),
        *(
            (f"score {score!r:.30}", http_answer({"scores": [score]}), b"")
            for score in (None, 5, "a", [], {}, {"valid": True})
        ),
        *(
            (f"answer {content!r:.30}", http_answer(content), b"")
            for content in (
                None,
                5,
                [],
                {},
                {"scores": 5},
                {"scores": []},
                {"scores": [GOOD] * 2},
                b"",
                b"\xff",
                b"no JSON",
                b"{",
                nested,
                b'{"scores": [' + nested + b"]}",
                b"[" * 100_000,
                b"9" * 5000,
                b'{"scores": [{"valid": true, "value": NaN}]}',
            )
        ),
        *(
            (f"status {status}", http_answer({"detail": ["x", {}]}, status), b"")
            for status in (
                201,
                204,
                301,
                304,
                308,
                400,
                401,
                403,
                404,
                405,
                408,
                413,
                418,
                422,
                500,
                502,
                504,
                599,
                999,
            )
        ),
        ("nothing", b"", b""),
        ("garbage", b"\x00\xff" * 50, b""),
        ("status of words", b"HTTP/1.1 abc OK\r\n\r\n", b""),
        ("line of 70 kB", ok + b"A: " + b"b" * 70_000 + b"\r\n\r\n", b""),
        ("line of 200 kB", ok + b"A: " + b"b" * 200_000 + b"\r\n\r\n", b""),
        ("200 headers", ok + b"A: b\r\n" * 200 + b"\r\n", b""),
        ("40,000 headers", ok + b"A: b\r\n" * 40_000 + b"\r\n", b""),
        ("cut body", ok + b"Content-Length: 100\r\n\r\n{", b""),
        ("cut chunk", chunked + b"10\r\n{", b""),
        ("trickled status", b"H", b"T"),
        ("trickled headers", ok, b"A: b\r\n"),
        ("trickled 100", b"", b"HTTP/1.1 100 a\r\n\r\n"),
        ("trickled body", ok + b"Content-Length: 1000\r\n\r\n{", b" "),
        ("trickled last body", ok + b"\r\n{", b" "),
        ("trickled chunk extension", chunked + b"1", b";a=b"),
        ("trickled chunks", chunked, b"1\r\n \r\n"),
        ("trickled trailers", chunked + b"0\r\n", b"A: b\r\n"),
    ]

"""One exchange with a server that does what it should not: it ends in time, and never with half an
answer.
"""

import contextlib
import http.client
import socket
import threading
import time

import pytest
from serving import scripted, trickling

from rewards.remote.connections import Connections

OK = b"HTTP/1.1 200 OK\r\n"


def exchange(url, timeout=0.15, body=()):
    return Connections(url).exchange("POST", "/", {}, body, timeout=timeout)


@pytest.mark.parametrize(
    "start, repeated",
    [
        (b"H", b"T"),
        (OK, b"A: b\r\n"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        (OK + b"Content-Length: 1000\r\n\r\n{", b" "),
        (OK + b"Connection: close\r\n\r\n{", b" "),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n1", b";a=b"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", b"A: b\r\n"),
    ],
)
def test_an_answer_that_trickles_is_ended_in_time(start, repeated):
    with trickling(start, repeated) as url:
        begin = time.monotonic()
        with pytest.raises(TimeoutError, match=r"no whole answer within 0\.15 s"):
            exchange(url)
        assert time.monotonic() - begin < 1.5


def test_a_request_that_is_not_read_is_ended_in_time():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        begin = time.monotonic()
        with pytest.raises(TimeoutError, match=r"no whole answer within 0\.2 s"):
            exchange(f"http://127.0.0.1:{silent.getsockname()[1]}", 0.2, [bytes(50_000_000)])
        assert time.monotonic() - begin < 1.5


def test_a_tls_greeting_that_trickles_is_ended_in_time():
    hello = b"\x16\x03\x03\x40\x00"  # a record of 16 KiB, of which a byte comes now and then
    with trickling(hello, b"\x02") as url:
        begin = time.monotonic()
        with pytest.raises(TimeoutError, match=r"no whole answer within 0\.15 s"):
            exchange(url.replace("http", "https"))
        assert time.monotonic() - begin < 1.5


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\r\n",
        b"HTTP",
        b"SSH-2.0-OpenSSH_9\r\n",
        b"HTTP/1.1 abc OK\r\n\r\n",
        b"HTTP/3 200 OK\r\n\r\n",
        OK + b"A: " + b"b" * 70_000 + b"\r\n\r\n",
        OK + b"A: b\r\n" * 200 + b"\r\n",
        OK + b"Content-Length: 10\r\n\r\n{}",
        OK + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n{}\r\n",
        OK + b"Transfer-Encoding: chunked\r\n\r\n10\r\n{}",
    ],
)
def test_half_an_answer_is_none(answer):
    with trickling(answer) as url, pytest.raises((OSError, http.client.HTTPException)):
        exchange(url, timeout=5)


def test_an_endless_answer_is_ended(monkeypatch):
    monkeypatch.setattr("rewards.remote.connections.MAX_ANSWER", 100_000)
    with trickling(OK + b"\r\n" + bytes(200_000), bytes(100)) as url:
        with pytest.raises(http.client.HTTPException, match="more than 100000 bytes"):
            exchange(url, timeout=5)


def test_closing_ends_an_answer_that_is_the_last_of_its_connection():
    with trickling(OK + b"Connection: close\r\n\r\n", b" ") as url:
        connections, begin = Connections(url), time.monotonic()
        timer = threading.Timer(0.2, connections.close)
        timer.start()
        with contextlib.suppress(OSError):
            connections.exchange("GET", "/", {}, timeout=30)
        timer.join()
        assert time.monotonic() - begin < 2


def test_the_next_address_of_a_host_is_tried(monkeypatch):
    with scripted(lambda *_: (200, "fine")) as url:
        port = int(url.rsplit(":", 1)[1])
        found = [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", address)
            for address in (("127.0.0.1", 9), ("127.0.0.1", port))
        ]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
        assert exchange("http://cpu1:8080", timeout=5).body == b'"fine"'
        found.pop()
        with pytest.raises(ConnectionRefusedError):
            exchange("http://cpu1:8080", timeout=5)


def test_an_ipv6_address():
    try:
        server = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError:
        pytest.skip("this machine has no IPv6")
    with (
        server,
        contextlib.closing(Connections(f"http://[::1]:{server.getsockname()[1]}")) as connections,
    ):
        with pytest.raises(TimeoutError):
            connections.exchange("GET", "/", {}, timeout=0.1)

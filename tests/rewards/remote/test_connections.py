"""Requests to one server: each ends in time and with a complete answer, or with an error, whatever
the server does.
"""

import contextlib
import gzip
import socket
import socketserver
import threading
import time

import pytest

from rewards.remote.connections import Connections, check_url
from tests.rewards.serving import scripted, trickling

OK = b"HTTP/1.1 200 OK\r\n"


def exchange(url, timeout=0.15, body=()):
    return Connections(url).exchange("POST", "/", {}, body, timeout=timeout)


@pytest.mark.quick_cases(2)
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
        with pytest.raises(TimeoutError, match=r"no complete answer within 0\.15 s"):
            exchange(url)
        assert time.monotonic() - begin < 1.5


def test_a_request_that_is_not_read_is_ended_in_time():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        begin = time.monotonic()
        with pytest.raises(TimeoutError, match=r"no complete answer within 0\.2 s"):
            exchange(f"http://127.0.0.1:{silent.getsockname()[1]}", 0.2, [bytes(50_000_000)])
        assert time.monotonic() - begin < 1.5


def test_a_tls_greeting_that_trickles_is_ended_in_time():
    hello = b"\x16\x03\x03\x40\x00"  # a record of 16 KiB, of which a byte comes now and then
    with trickling(hello, b"\x02") as url:
        begin = time.monotonic()
        with pytest.raises(TimeoutError, match=r"no complete answer within 0\.15 s"):
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
        OK + b"A: " + b"b" * 200_000 + b"\r\n\r\n",
        OK + b"A: b\r\n" * 40_000 + b"\r\n",
        OK + b"Content-Length: 10\r\n\r\n{}",
        OK + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n{}\r\n",
        OK + b"Transfer-Encoding: chunked\r\n\r\n10\r\n{}",
    ],
)
def test_half_an_answer_is_none(answer):
    with trickling(answer) as url, pytest.raises(ConnectionError):
        exchange(url, timeout=5)


def test_an_endless_answer_is_ended(monkeypatch):
    monkeypatch.setattr("rewards.remote.connections.MAX_ANSWER", 100_000)
    with trickling(OK + b"\r\n" + bytes(200_000), bytes(100)) as url:
        with pytest.raises(ConnectionError, match="100000"):
            exchange(url, timeout=5)


def test_a_compressed_answer_is_not_unpacked():
    """An answer of a few bytes must not become one of gigabytes."""
    bomb = gzip.compress(bytes(1_000_000))
    head = OK + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(bomb)
    with trickling(head + bomb) as url:
        assert exchange(url, timeout=5).body == bomb


def test_a_redirect_is_not_followed():
    with scripted(lambda *_: (200, "elsewhere")) as other:
        head = b"HTTP/1.1 307 Go\r\nLocation: %s\r\nContent-Length: 0\r\n\r\n" % other.encode()
        with trickling(head) as url:
            assert exchange(url, timeout=5).status == 307


def test_a_proxy_of_the_environment_is_not_used(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with scripted(lambda *_: (200, "fine")) as url:
        assert exchange(url, timeout=5).body == b'"fine"'


def test_closing_ends_an_answer_that_is_the_last_of_its_connection():
    with trickling(OK + b"Connection: close\r\n\r\n", b" ") as url:
        connections, begin = Connections(url), time.monotonic()
        timer = threading.Timer(0.2, connections.close)
        timer.start()
        with pytest.raises(ConnectionError, match="closed"):
            connections.exchange("GET", "/", {}, timeout=30)
        timer.join()
        assert time.monotonic() - begin < 2


def test_a_connection_is_used_again_and_a_closed_one_is_not():
    clients = []

    class Handler(socketserver.StreamRequestHandler):
        def handle(self):
            """Answer two requests, then close the connection."""
            for _ in range(2):
                size = 0
                while (line := self.rfile.readline()).strip():
                    size = int(line[16:]) if line.lower().startswith(b"content-length: ") else size
                if not line:
                    return
                clients.append(self.client_address)
                body = self.rfile.read(size)
                self.wfile.write(OK + b"Content-Length: %d\r\n\r\n" % len(body) + body)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        connections = Connections(f"http://127.0.0.1:{server.server_address[1]}")
        for _ in range(3):
            answer = connections.exchange("POST", "/", {}, [b"12", memoryview(b"3")], timeout=5)
            assert answer.body == b"123"
        connections.close()
        server.shutdown()
    assert clients[0] == clients[1] != clients[2]
    with pytest.raises(ConnectionError, match="closed"):
        connections.exchange("GET", "/", {}, timeout=5)


def test_the_next_address_of_a_host_is_tried(monkeypatch):
    with scripted(lambda *_: (200, "fine")) as url:
        port = int(url.rsplit(":", 1)[1])
        addresses = [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))
            for address in ("127.0.0.9", "127.0.0.1")
        ]
        resolve = socket.getaddrinfo

        def getaddrinfo(host, *args, **options):
            return addresses if host in ("cpu1", b"cpu1") else resolve(host, *args, **options)

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
        assert exchange(f"http://cpu1:{port}", timeout=5).body == b'"fine"'
        addresses.pop()
        with pytest.raises(ConnectionError, match="refused"):
            exchange(f"http://cpu1:{port}", timeout=5)
        addresses.append((*addresses[0][:-1], ("127.0.0.8", port)))
        with pytest.raises(ConnectionError, match="refused"):
            exchange(f"http://cpu1:{port}", timeout=5)


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


@pytest.mark.parametrize(
    "url, message",
    [
        ("cpu1:8080", "write http://host:port"),
        ("ftp://cpu1", "write http"),
        ("http://", "write http"),
        ("http://cpu1:port", "not a URL"),
        ("http://cpu1/?a=b", "write http"),
        (7, "not a URL"),
        ("http://user:pass@cpu1", "environment variable"),
    ],
)
def test_unusable_urls(url, message):
    with pytest.raises(ValueError, match=message) as error:
        check_url(url)
    assert "pass@" not in str(error.value)


def test_a_url_that_only_the_http_package_refuses():
    with pytest.raises(ValueError, match="not a URL"):
        Connections("http://cpu1/\x00")

"""Admission: clients with the token get answers, whatever others do with their connections."""

import contextlib
import json
import resource
import select
import socket
import threading
import time
import urllib.parse

import numpy as np
import pytest

from tests.rewards import pool_rewards
from tests.rewards.serving import TOKEN, serving, wait_for

pytest.importorskip("fastapi")

from rewards.remote.admission import MAX_ACCEPTED, MAX_CONNECTIONS, Admission, connection_limits
from rewards.remote.wire import CONTENT_TYPE, encode_request

BODY = b"".join(encode_request(np.zeros((1, 2, 4, 5, 3), np.uint8), ["a"]))
LENGTH = len(BODY)
HEALTH = f"GET /v1/health HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {TOKEN}\r\n\r\n".encode()
STRANGER = b"GET /v1/health HTTP/1.1\r\nHost: a\r\n\r\n"


def post(length=LENGTH, token=TOKEN):
    size = (
        f"Content-Length: {length}\r\n" if length is not None else "Transfer-Encoding: chunked\r\n"
    )
    return (
        f"POST /v1/score HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {token}\r\nContent-Type: "
        f"{CONTENT_TYPE}\r\n{size}\r\n"
    ).encode()


def connect(url, data=b""):
    parts = urllib.parse.urlsplit(url)
    sock = socket.create_connection((parts.hostname, parts.port), timeout=5)
    sock.sendall(data)
    return sock


def answer(sock):
    """(status, JSON) of the next answer; (None, None) where the connection was closed instead."""
    try:
        with sock.makefile("rb") as file:
            status = file.readline()
            headers = {
                name.lower(): value
                for name, _, value in (
                    line.decode().strip().partition(": ") for line in iter(file.readline, b"\r\n")
                )
            }
            return int(status.split()[1]), json.loads(file.read(int(headers["content-length"])))
    except (ConnectionResetError, IndexError):
        return None, None


def is_open(sock):
    try:
        return not select.select([sock], [], [], 0)[0] or sock.recv(1, socket.MSG_PEEK) != b""
    except ConnectionResetError:
        return False


@contextlib.contextmanager
def sending(sock, data, pause=0.02):
    """Send `data` again and again, and read nothing."""
    stop = threading.Event()

    def send():
        with contextlib.suppress(OSError):
            while not stop.wait(pause):
                sock.sendall(data)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        sock.close()
        thread.join()


def test_strangers_are_closed_in_time(caplog):
    admission = Admission(100, header_timeout=0.4)
    with serving(admission=admission) as url, contextlib.ExitStack() as stack:
        silent = [
            stack.enter_context(connect(url, data))
            for data in (
                b"",
                b"GET /v1/health HTTP/1.1\r\nHost",
                post(1000, "wrong"),
                post(None, "wrong"),
                STRANGER * 3,
            )
        ]
        for start, repeated in (
            (b"GET / HTTP/1.1\r\n", b"A: b\r\n"),
            (post(10**9, "wrong"), bytes(100)),
            (b"", STRANGER * 300),
        ):
            silent.append(connect(url, start))
            stack.enter_context(sending(silent[-1], repeated))
        assert answer(connect(url, post() + BODY))[0] == 200  # meanwhile
        start = time.monotonic()
        wait_for(lambda: not admission.untrusted)
        assert time.monotonic() - start < 2
        assert answer(connect(url, HEALTH))[0] == 200
    assert (
        sum("no request with the token within 0.4 s" in record.message for record in caplog.records)
        == 1
    )


def test_a_stranger_makes_room_for_a_client(caplog):
    admission = Admission(8)
    with serving(admission=admission) as url, contextlib.ExitStack() as stack:
        client = stack.enter_context(connect(url, HEALTH))
        assert answer(client)[0] == 200
        others = [stack.enter_context(connect(url, b"GET" if n % 2 else b"")) for n in range(40)]
        for _ in range(5):
            assert answer(stack.enter_context(connect(url, post() + BODY)))[0] == 200
        client.sendall(HEALTH)
        assert answer(client)[0] == 200  # it was not closed to make room
        assert sum(map(is_open, others)) <= 8
    assert sum("ulimit -n" in record.message for record in caplog.records) == 1


def test_an_idle_client_makes_room_for_another_one():
    with serving(admission=Admission(8)) as url, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(url, HEALTH)) for _ in range(8)]
        assert [answer(client)[0] for client in clients] == [200] * 8
        clients.append(stack.enter_context(connect(url, HEALTH)))
        assert answer(clients[-1])[0] == 200
        wait_for(lambda: not is_open(clients[0]))
        assert all(map(is_open, clients[1:]))


def test_requests_under_way_leave_room_for_answers():
    with (
        serving(pool_rewards.Slow, workers=8, admission=Admission(8)) as url,
        contextlib.ExitStack() as stack,
    ):
        under_way = [stack.enter_context(connect(url, post() + BODY)) for _ in range(4)]
        wait_for(lambda: answer(connect(url, HEALTH))[1]["queue"] == 4)
        status, content = answer(stack.enter_context(connect(url, post() + BODY)))
        assert status == 503 and content["detail"].startswith("4 requests are under way")
        for _ in range(10):
            stack.enter_context(connect(url))
        assert [answer(client)[0] for client in under_way] == [200] * 4


def test_an_idle_client_that_trickles_is_closed():
    admission = Admission(100, header_timeout=0.1, keep_alive=0.2)
    with serving(admission=admission) as url, contextlib.closing(connect(url, HEALTH)) as client:
        assert answer(client)[0] == 200
        wait_for(lambda: admission.idle)
        client.sendall(b"GET /v1/health HTTP/1.1\r\n")
        with sending(client, b"A: b\r\n"):
            wait_for(lambda: not admission.idle)


def test_a_request_of_a_closed_connection_does_not_count_as_under_way():
    admission, done = Admission(8), threading.Event()
    with serving(admission=admission) as url, contextlib.closing(connect(url)):
        wait_for(lambda: admission.untrusted)
        connection = next(iter(admission.untrusted))

        # as where a connection is closed before its request comes to its turn
        def close_and_authorise():
            connection.abort()
            connection.authorised()
            done.set()

        connection.loop.call_soon_threadsafe(close_and_authorise)
        assert done.wait(10) and not admission.busy and not admission.untrusted


def test_bodies_that_would_take_too_much_memory_are_not_read(caplog):
    with serving(max_memory=1000) as url, contextlib.ExitStack() as stack:
        first = stack.enter_context(connect(url, post(900)))
        wait_for(lambda: answer(connect(url, HEALTH))[1]["queue"] == 1)
        # 256 bytes, no end
        for header, data in ((post(), b""), (post(None), b"100\r\n" + bytes(256) + b"\r\n")):
            status, content = answer(stack.enter_context(connect(url, header + data)))
            assert (
                status == 503
                and "900 bytes are used" in content["detail"]
                and "limit of 1000" in content["detail"]
            )
        first.close()
        wait_for(lambda: answer(connect(url, HEALTH))[1]["queue"] == 0)
        assert answer(connect(url, post() + BODY))[0] == 200
        chunks = b"%x\r\n" % len(BODY) + BODY + b"\r\n0\r\n\r\n"
        assert answer(connect(url, post(None) + chunks))[0] == 200
    messages = [record.message for record in caplog.records]
    assert sum("1000 bytes together" in message for message in messages) == 1
    assert [message for message in messages if "left" in message] == [
        "a client left while it sent a request: 0 bytes of 900 had arrived"
    ]


def test_a_full_queue_refuses_before_the_body():
    with serving(max_queue=1) as url, contextlib.ExitStack() as stack:
        stack.enter_context(connect(url, post()))
        wait_for(lambda: answer(connect(url, HEALTH))[1]["queue"] == 1)
        status, content = answer(stack.enter_context(connect(url, post(10**6))))
        assert status == 503 and "limit of 1:" in content["detail"]


def test_a_slow_upload_is_ended():
    with (
        serving(upload_timeout=0.2) as url,
        connect(url, post(1000)) as client,
        sending(client, b"a", 0.02),
    ):
        status, content = answer(client)
    assert status == 408 and "0.2 s" in content["detail"]


def test_limits_follow_the_limit_of_open_files(monkeypatch):
    monkeypatch.setattr(resource, "setrlimit", lambda *_: None)
    monkeypatch.setattr("os.listdir", lambda _: ["0"] * 7)

    def limits(files, workers=2):
        monkeypatch.setattr(resource, "getrlimit", lambda _: (10, files))
        return connection_limits(workers)

    for files in (64, 256, 1024):
        connections, at_once = limits(files)
        assert 8 <= connections < MAX_CONNECTIONS and connections + 5 * at_once + 7 < files
    assert limits(resource.RLIM_INFINITY) == limits(1 << 20) == (MAX_CONNECTIONS, MAX_ACCEPTED)
    with pytest.raises(
        ValueError, match=r"64 files, too few for 16 workers.* 127 or more \(ulimit -n\)"
    ):
        limits(64, workers=16)

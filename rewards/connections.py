"""Kept-alive HTTP connections to one server, on the standard library.

One object serves many threads. Against a client library: no dependency, a time limit on the exchange as a whole, and
`close` ends what other threads are waiting for, so that a trainer that stops does not wait for a server that hangs.
Proxies of the environment are not used: reward servers stand in the same network.
"""

import dataclasses
import http.client
import select
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Mapping, Sequence

CONNECT_TIMEOUT = 10.0  # seconds; a host that is off answers nothing at all
MAX_ANSWER = 64 << 20  # bytes; the scores of 64 long videos are far below


@dataclasses.dataclass(frozen=True)
class Answer:
    status: int
    headers: http.client.HTTPMessage
    body: bytes


def check_url(url: str) -> urllib.parse.SplitResult:
    """The parts of a server's address. Raises ValueError that names the fix, without repeating a password."""
    try:
        parts = urllib.parse.urlsplit(url)
        parts.port  # noqa: B018  (raises ValueError)
    except (ValueError, AttributeError) as error:
        raise ValueError(f"server {url!r} is not a URL ({error}): write http://host:port") from None
    if parts.username or parts.password:
        raise ValueError(f"the URL of server {parts.hostname!r} has a name or a password in it: give the token in an "
                         f"environment variable instead")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ValueError(f"server {url!r} is not a URL of a server: write http://host:port or https://host/path")
    return parts


class Connections:
    """As many connections to `url` as threads use at the same time."""

    def __init__(self, url: str):
        self._parts = check_url(url)
        self._idle: list[http.client.HTTPConnection] = []
        self._busy: set[http.client.HTTPConnection] = set()
        self._lock, self._closed = threading.Lock(), False

    def exchange(self, method: str, path: str, headers: Mapping[str, str], body: Sequence[bytes | memoryview] = (),
                 *, timeout: float) -> Answer:
        """One request and its answer, in at most `timeout` seconds.

        Raises OSError (TimeoutError among them) or http.client.HTTPException.
        """
        deadline = time.monotonic() + timeout
        connection, reusable = self._take(min(timeout, CONNECT_TIMEOUT)), False
        try:
            if connection.sock is None:
                connection.connect()
            sock = connection.sock
            sock.settimeout(_left(deadline))
            length = str(sum(len(part) for part in body))
            connection.request(method, self._parts.path.rstrip("/") + path, body or None,
                               {**headers, **({"Content-Length": length} if body else {})})
            sock.settimeout(_left(deadline))
            with connection.getresponse() as response:
                answer = Answer(response.status, response.headers, _read(response, sock, deadline))
                reusable = not response.will_close
            return answer
        finally:
            with self._lock:
                self._busy.discard(connection)
                if reusable and not self._closed:
                    self._idle.append(connection)
                else:
                    connection.close()

    def _take(self, timeout: float) -> http.client.HTTPConnection:
        with self._lock:
            if self._closed:
                raise ConnectionAbortedError("the connections are closed")
            while self._idle:
                connection = self._idle.pop()
                if not _is_stale(connection.sock):
                    break
                connection.close()
            else:
                host, port = self._parts.hostname, self._parts.port
                if self._parts.scheme == "https":
                    connection = http.client.HTTPSConnection(host, port, timeout=timeout,
                                                             context=ssl.create_default_context())
                else:
                    connection = http.client.HTTPConnection(host, port, timeout=timeout)
            self._busy.add(connection)
            return connection

    def close(self) -> None:
        """Ends every exchange: those under way raise."""
        with self._lock:
            self._closed = True
            for connection in self._idle:
                connection.close()
            for connection in self._busy:
                if (sock := connection.sock) is not None:
                    try:
                        sock.shutdown(socket.SHUT_RDWR)  # unlike close, wakes the thread that waits on it
                    except OSError:
                        pass
            self._idle.clear()


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("timed out")
    return left


def _read(response: http.client.HTTPResponse, sock: socket.socket, deadline: float) -> bytes:
    """The whole body; `sock` is given along as a response that ends the connection hides its own."""
    body = bytearray()
    while not response.isclosed():  # else the socket may be closed, too
        sock.settimeout(_left(deadline))
        chunk = response.read1(1 << 16)
        if not chunk:
            break
        body += chunk
        if len(body) > MAX_ANSWER:
            raise http.client.HTTPException(f"an answer of more than {MAX_ANSWER} bytes")
    return bytes(body)


def _is_stale(sock: socket.socket) -> bool:
    """Whether the server has closed an idle connection: there is an end of file (or nonsense) to read."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


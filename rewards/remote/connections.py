"""Keeps HTTP connections to one server open, with the standard library only.

One object serves many threads. Compared with a client library: no dependency, a time limit on the
whole exchange, and `close` ends what other threads are waiting for, so that a trainer that stops
does not wait for a server that hangs. Proxies of the environment are not used: reward servers stand
in the same network.
"""

import contextlib
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
    """The parts of a server's address. Raises ValueError that names the fix, without repeating a
    password.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        parts.port  # noqa: B018  (raises ValueError)
        (parts.hostname or "").encode("idna")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"server {url!r} is not a URL ({error}): write http://host:port") from None
    if parts.username or parts.password:
        raise ValueError(
            f"the URL of server {parts.hostname!r} has a name or a password in it: give the token "
            "in an environment variable instead"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ValueError(
            f"server {url!r} is not a URL of a server: write http://host:port or https://host/path"
        )
    return parts


class Connections:
    """As many connections to `url` as threads use at the same time."""

    def __init__(self, url: str):
        self._parts = check_url(url)
        self._idle: list[_Connection] = []
        self._busy: set[_Connection] = set()
        self._lock, self._closed = threading.Lock(), False

    def exchange(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str],
        body: Sequence[bytes | memoryview] = (),
        *,
        timeout: float,
    ) -> Answer:
        """One request and its answer, in at most `timeout` seconds, however slowly the other side
        sends. Only the system's look-up of the host's name has limits of its own.

        Raises OSError (TimeoutError among them) or http.client.HTTPException.
        """
        deadline = time.monotonic() + timeout
        connection, reusable, expired = self._take(), False, threading.Event()

        def expire() -> None:
            expired.set()
            connection.end()

        # a socket's own timeout begins anew with every byte
        timer = threading.Timer(timeout, expire)
        timer.daemon = True
        timer.start()
        try:
            if connection.sock is None:
                connection.open(deadline)
            connection.sock.settimeout(_left(deadline))
            length = str(sum(len(part) for part in body))
            connection.request(
                method,
                self._parts.path.rstrip("/") + path,
                body or None,
                {**headers, **({"Content-Length": length} if body else {})},
            )
            with connection.getresponse() as response:
                answer = Answer(response.status, response.headers, _read(response))
                _left(deadline)  # else the end of the answer may be that of the time
                reusable = not response.will_close
        except Exception as error:
            if expired.is_set() or isinstance(error, TimeoutError):
                raise TimeoutError(f"no whole answer within {timeout:g} s") from None
            raise
        finally:
            timer.cancel()
            timer.join()
            with self._lock:
                self._busy.discard(connection)
                if reusable and not expired.is_set() and not self._closed:
                    self._idle.append(connection)
                else:
                    connection.close()
        return answer

    def _take(self) -> "_Connection":
        with self._lock:
            if self._closed:
                raise ConnectionAbortedError("the connections are closed")
            while self._idle:
                connection = self._idle.pop()
                if not _is_stale(connection.sock):
                    break
                connection.close()
            else:
                connection = _Connection(self._parts)
            self._busy.add(connection)
            return connection

    def close(self) -> None:
        """Ends every exchange: those under way raise."""
        with self._lock:
            self._closed = True
            for connection in self._idle:
                connection.close()
            for connection in self._busy:
                connection.end()
            self._idle.clear()


class _Connection(http.client.HTTPConnection):
    """A connection that another thread can end. parts: of the server's URL."""

    def __init__(self, parts: urllib.parse.SplitResult):
        self._secure = parts.scheme == "https"
        self.default_port = 443 if self._secure else 80
        # without one, ::1 would be taken for port 1
        super().__init__(parts.hostname, parts.port or self.default_port)
        # kept here, as `sock` is None while a last answer is read
        self._socket: socket.socket | None = None

    def open(self, deadline: float) -> None:
        """Connects to the first address of the host that answers."""
        addresses = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        for number, (family, kind, protocol, _, address) in enumerate(addresses, 1):
            seconds = min(CONNECT_TIMEOUT, _left(deadline))
            self._socket = socket.socket(family, kind, protocol)
            self._socket.settimeout(seconds)
            try:
                self._socket.connect(address)
                break
            except OSError as error:
                self._socket.close()
                if number == len(addresses):
                    if isinstance(error, TimeoutError):
                        raise ConnectionError(f"no connection within {seconds:g} s") from None
                    raise
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._secure:
            self._socket = ssl.create_default_context().wrap_socket(
                self._socket, server_hostname=self.host, do_handshake_on_connect=False
            )
        self.sock = self._socket
        _left(deadline)  # the time may have ended before there was a socket to end
        if self._secure:
            self._socket.do_handshake()

    def end(self) -> None:
        """Ends what a thread waits for on this connection: unlike `close`, it wakes that thread."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                # of TLS, too, without its farewell
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("timed out")
    return left


def _read(response: http.client.HTTPResponse) -> bytes:
    """The whole body."""
    body = bytearray()
    while chunk := response.read1(1 << 16):
        body += chunk
        if len(body) > MAX_ANSWER:
            raise http.client.HTTPException(f"an answer of more than {MAX_ANSWER} bytes")
    if response.length:
        raise http.client.HTTPException(
            f"an answer that ended {response.length} bytes before its end"
        )
    return bytes(body)


def _is_stale(sock: socket.socket) -> bool:
    """Whether the server has closed an idle connection: there is an end of file (or nonsense) to
    read.
    """
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))

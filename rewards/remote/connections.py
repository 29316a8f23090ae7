"""HTTP requests to one server, from any number of threads, within limits that no server can exceed.

The time limit covers the whole exchange, however slowly the server sends, and an answer has a
largest size. `close` ends the requests of other threads, so a trainer that stops does not wait for
a server that hangs. Redirects, cookies, content encodings and the proxies of the environment are
not used: reward servers are in the same network.
"""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import functools
import os
import ssl
import threading
import urllib.parse
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import cast

import httpx2

CONNECT_TIMEOUT = 10.0  # seconds; a host that is switched off does not answer at all
MAX_ANSWER = 64 << 20  # bytes; the scores of 64 long videos are far below
_PIECE = 1 << 20  # bytes of a request's body that are sent at a time


@dataclasses.dataclass(frozen=True)
class Answer:
    """A complete answer of a server."""

    status: int
    body: bytes


def check_url(url: str) -> urllib.parse.SplitResult:
    """Return the parts of a server's URL. Raises `ValueError` that names the fix and repeats no
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
    """Connections to the server at `url`: as many as threads use at the same time.

    Raises `ValueError` for a URL that cannot be used.
    """

    def __init__(self, url: str):
        try:
            self._url = httpx2.URL(check_url(url).geturl().rstrip("/"))
        except httpx2.InvalidURL as error:
            raise ValueError(f"server {url!r} is not a URL ({error})") from None
        self._transport = httpx2.AsyncHTTPTransport(
            verify=ssl.create_default_context(),
            trust_env=False,
            limits=httpx2.Limits(max_connections=None, keepalive_expiry=None),
        )
        self._loop = _event_loop()
        # used on the event loop's thread only
        self._tasks: set[asyncio.Task] = set()
        self._closed = False

    def exchange(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str],
        body: Sequence[bytes | memoryview] = (),
        *,
        timeout: float,
    ) -> Answer:
        """Send one request and return its answer, within `timeout` seconds.

        Raises `TimeoutError`, or `ConnectionError` with the reason, also after `close`.
        """
        size = {"Content-Length": str(sum(map(len, body)))} if body else {}
        request = httpx2.Request(
            method,
            f"{self._url}{path}",
            headers={"Accept-Encoding": "identity", **headers, **size},
            content=cast(AsyncIterator[bytes], _pieces(body)) if body else None,
            extensions={"timeout": {"connect": CONNECT_TIMEOUT}},
        )
        future = asyncio.run_coroutine_threadsafe(self._exchange(request, timeout), self._loop)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise ConnectionAbortedError("the connections are closed") from None
        except httpx2.TransportError as error:
            raise ConnectionError(_reason(error)) from error

    def close(self) -> None:
        """End every exchange: those under way raise `ConnectionError`."""
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()

    async def _exchange(self, request: httpx2.Request, timeout: float) -> Answer:
        if self._closed:
            raise ConnectionAbortedError("the connections are closed")
        task, body = asyncio.current_task(), bytearray()
        assert task is not None  # a coroutine runs in a task
        self._tasks.add(task)
        try:
            async with asyncio.timeout(timeout):
                response = await self._transport.handle_async_request(request)
                async with contextlib.aclosing(response):
                    async for piece in response.aiter_raw():
                        body += piece
                        if len(body) > MAX_ANSWER:
                            raise ConnectionError(f"an answer of more than {MAX_ANSWER} bytes")
        except TimeoutError:
            raise TimeoutError(f"no complete answer within {timeout:g} s") from None
        finally:
            self._tasks.discard(task)
        return Answer(response.status_code, bytes(body))

    async def _close(self) -> None:
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await self._transport.aclose()


@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """Return the event loop of all requests of this process. It runs in a thread of its own."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="reward requests", daemon=True).start()
    return loop


async def _pieces(body: Sequence[bytes | memoryview]) -> AsyncIterator[bytes | memoryview]:
    for part in body:
        for start in range(0, len(part), _PIECE):
            yield part[start : start + _PIECE]


def _reason(error: httpx2.TransportError) -> str:
    """Explain a failed request: by the error of the operating system, where one is the cause."""
    if isinstance(error, httpx2.ConnectTimeout):
        return f"no connection within {CONNECT_TIMEOUT:g} s"
    if isinstance(error, httpx2.RemoteProtocolError):
        return f"no valid HTTP answer: {str(error).rstrip('.')}"
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ExceptionGroup):  # one error per address of the host
            cause = cause.exceptions[-1]
        if isinstance(cause, OSError) and cause.errno is not None and cause.errno > 0:
            return os.strerror(cause.errno)
        cause = cause.__cause__ or cause.__context__
    return str(error) or type(error).__name__

"""The application of a reward server: a FastAPI application around a `RewardPool`, and how uvicorn
runs it.

docs/howto/rewards_server.md documents the paths and the wire format. Needs `pip install -e '.[server]'`.
"""

import asyncio
import contextlib
import functools
import hmac
import importlib.metadata
import logging
import platform
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any, cast

import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from starlette.requests import ClientDisconnect

from rewards.base import PromptRecord, RewardError
from rewards.batch_scores import BatchScores, PendingScores
from rewards.pool import RewardPool
from rewards.remote.admission import MAX_ACCEPTED, Admission, Connection, Quota
from rewards.remote.wire import (
    CONTENT_TYPE,
    DEFAULT_LIMITS,
    HEALTH_PATH,
    MAX_MEMORY,
    MAX_QUEUE,
    SCORE_PATH,
    UPLOAD_TIMEOUT,
    VERSIONS,
    Limits,
    WireError,
    decode_request,
    encode_scores,
)

log = logging.getLogger("rewards.server")

BACKLOG = 1024  # connections that the operating system queues until they are accepted
PACKAGES = (
    "wan-jax-grpo",
    "numpy",
    "rapidfuzz",
    "rapidocr",
    "onnxruntime",
    "paddleocr",
    "paddlepaddle",
)  # of which scores depend on the version


def make_app(
    pool: RewardPool,
    about: dict[str, Any],
    token: str = "",
    limits: Limits = DEFAULT_LIMITS,
    *,
    max_queue: int = MAX_QUEUE,
    max_memory: int = MAX_MEMORY,
    upload_timeout: float = UPLOAD_TIMEOUT,
) -> FastAPI:
    """Return the application with the two paths of the reward server, for `make_server`.

    about: shown as "reward" by the health page. token: required in every request, unless "".
    max_queue: videos that arrive, wait or are scored; max_memory: bytes of their requests. Above
    either, a request is answered with 503 before its body is read. upload_timeout: seconds for a
    request's body to arrive.
    """
    queue = Quota(max_queue, "videos", "--max_queue, or start more workers or servers,")
    memory = Quota(max_memory, "bytes", "--max_memory_mib")
    api = FastAPI(title="reward server", docs_url=None, redoc_url=None, openapi_url=None)
    versions, expected = package_versions(), f"Bearer {token}".encode()

    def authorise(request: Request) -> Connection:
        """Raise `HTTPException` unless the request carries the token."""
        authorisation = request.headers.get("authorization", "").encode("latin-1")
        # compare_digest takes the same time wherever the two differ
        if token and not hmac.compare_digest(authorisation, expected):
            raise HTTPException(
                401,
                "send the server's token as 'Authorization: Bearer TOKEN'",
                {"WWW-Authenticate": "Bearer"},
            )
        request.state.connection.authorised()
        return request.state.connection

    @api.get(HEALTH_PATH)
    async def health(request: Request) -> dict[str, Any]:
        authorise(request)
        return {
            "reward": about,
            "groupwise": pool.traits.groupwise,
            "wire": VERSIONS,
            "versions": versions,
            "workers": pool.workers,
            "queue": queue.used,
            "max_queue": max_queue,
            "limits": vars(limits),
        }

    @api.post(SCORE_PATH)
    async def score(request: Request) -> Response:
        authorise(request).admission.check_not_crowded()
        with memory.claims() as claim_bytes, queue.claims() as claim_videos:
            claim_videos(1)  # at least one; the body will tell how many
            try:
                body = await _read_body(request, limits.body, upload_timeout, claim_bytes)
                asked = decode_request(body, limits)
            except WireError as error:
                raise HTTPException(error.status, str(error)) from None
            count = len(asked.videos)
            claim_videos(count - 1)
            records = asked.records
            if not pool.traits.needs_prompt:
                records = [r.targets if isinstance(r, PromptRecord) else r for r in records]
            groups = [object()] * count if asked.group else None  # equal to no other request's
            pending = pool.submit(asked.videos, records, groups, count)
            scores = await _wait_for(pending, request)
        return Response(encode_scores(scores, asked.version), media_type="application/json")

    return api


async def _read_body(
    request: Request, limit: int, timeout: float, claim: Callable[[int], None]
) -> bytearray:
    """Return a request's body; it claims memory before it stores bytes. Raises `WireError` for a
    wrong type, a body that is too large or a client that is too slow.
    """
    kind = request.headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != CONTENT_TYPE:
        raise WireError(
            f"content type {kind[:100]!r} is not accepted: send {CONTENT_TYPE}, docs/howto/rewards_server.md",
            415,
        )
    body, claimed = bytearray(), 0

    def expect(size: int) -> None:
        nonlocal claimed
        if size > limit:
            raise WireError(
                f"the request has at least {size} bytes, more than the limit of {limit}: send "
                "fewer videos in a request, or start the server with a higher --max_mib",
                413,
            )
        if size > claimed:
            claim(size - claimed)
            claimed = size

    expect(int(request.headers.get("content-length", "0")))  # the HTTP parser accepts only digits
    try:
        async with asyncio.timeout(timeout):
            async for chunk in request.stream():
                expect(len(body) + len(chunk))
                body += chunk
    except TimeoutError:
        raise WireError(
            f"the request did not arrive within {timeout:g} s: send fewer videos in a request, or "
            "start the server with a higher --upload_timeout",
            408,
        ) from None
    except ClientDisconnect:
        log.warning(
            "a client left while it sent a request: %d bytes of %s had arrived",
            len(body),
            claimed or "some",
        )
        raise HTTPException(499, "the client closed the connection") from None
    return body


async def _wait_for(pending: PendingScores, request: Request) -> BatchScores:
    """Wait for the scores. If the client leaves, cancel the videos that are still queued."""
    waiting = {asyncio.wrap_future(future) for future in pending.futures}
    while waiting:
        _, waiting = await asyncio.wait(waiting, timeout=1.0)
        if waiting and await request.is_disconnected():
            for future in pending.futures:
                future.cancel()
            raise HTTPException(499, "the client closed the connection")
    try:
        return pending.result()
    except RewardError as error:  # the server is stopping
        raise HTTPException(503, str(error)) from None


def package_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that scores depend on."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


# --- Serving --------------------------------------------------------------------------------------


class _Server(uvicorn.Server):
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and then set the sockets' backlog: uvicorn's setting also limits how many
        connections are accepted at once.
        """
        await super().startup(sockets)
        for sock in sockets or ():
            sock.listen(BACKLOG)


def make_server(
    api: FastAPI, admission: Admission, accepted: int = MAX_ACCEPTED, grace: int | None = None
) -> uvicorn.Server:
    """Return a server for the application of `make_app`.

    accepted: connections accepted in one turn of the event loop. grace: seconds in which requests
    under way may finish when the server is stopped; None waits for all.
    """
    config = uvicorn.Config(
        api,
        http=cast(type[asyncio.Protocol], functools.partial(Connection, admission)),
        loop="asyncio",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        log_level="error",  # a warning per malformed request would let anyone fill the log
        backlog=accepted,
        timeout_keep_alive=cast(int, admission.keep_alive),  # a float works as well
        timeout_graceful_shutdown=grace,
    )
    return _Server(config)


def serve(server: uvicorn.Server, sock: socket.socket) -> None:
    """Answer requests until SIGTERM or SIGINT, then let those under way finish and exit with 0."""
    # When uvicorn is done, it restores these handlers and raises the signal again.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    server.run(sockets=[sock])

"""Serves a reward over HTTP: `python -m rewards.server --host=0.0.0.0 --port=8080 --workers=16
--rule=spelling`.

A FastAPI application around a `RewardPool`; the wire format is in docs/rewards_server.md, the
client in rewards/remote/client.py. Needs `pip install -e '.[server]'`.
"""

import asyncio
import contextlib
import functools
import hmac
import importlib
import importlib.metadata
import inspect
import ipaddress
import json
import logging
import os
import pathlib
import platform
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

from absl import app, flags

from rewards.base import RewardError
from rewards.ocr.engines import ENGINES
from rewards.ocr.rules import RULES, OCRReward
from rewards.remote.wire import (
    CONTENT_TYPE,
    DEFAULT_LIMITS,
    HEALTH_PATH,
    SCORE_PATH,
    Limits,
    WireError,
    decode_request,
    encode_scores,
)
from rewards.workers import BatchScores, PendingScores, RewardPool

try:
    import uvicorn
    from fastapi import FastAPI, HTTPException, Request, Response
    from starlette.requests import ClientDisconnect

    from rewards.remote.admission import Admission, Connection, Quota, connection_limits
except ImportError as _error:
    raise ImportError(
        f"the reward server needs a package that is missing ({_error}): "
        f"pip install 'wan-jax-grpo[server]', or fastapi and uvicorn"
    ) from _error

log = logging.getLogger("rewards.server")

UPLOAD_TIMEOUT = 60.0  # seconds for a request's body to arrive
MAX_MEMORY = 4096 << 20  # bytes of all requests together
BACKLOG = 1024  # connections that the system holds until they are accepted
PACKAGES = (
    "wan-jax-grpo",
    "numpy",
    "rapidfuzz",
    "rapidocr",
    "onnxruntime",
    "paddleocr",
    "paddlepaddle",
)


# --- the application ------------------------------------------------------------------------------


def make_app(
    pool: RewardPool,
    about: dict[str, Any],
    token: str = "",
    limits: Limits = DEFAULT_LIMITS,
    *,
    max_queue: int = 1024,
    max_memory: int = MAX_MEMORY,
    upload_timeout: float = UPLOAD_TIMEOUT,
) -> FastAPI:
    """The two paths of the reward server, to be run by `make_server`.

    about: shown as "reward" by the health page. token: asked of every request, unless "".
    max_queue: videos that arrive, wait or are scored, and max_memory: bytes of their requests,
    above which a request is
        answered with 503 before its body is read.
    """
    queue = Quota(max_queue, "videos", "--max_queue, or start more workers or servers,")
    memory = Quota(max_memory, "bytes", "--max_memory_mib")
    api = FastAPI(title="reward server", docs_url=None, redoc_url=None, openapi_url=None)
    known, expected = versions(), f"Bearer {token}".encode()

    def authorise(request: Request) -> Connection:
        """Raises HTTPException without the token."""
        given = request.headers.get("authorization", "").encode("latin-1")
        # takes the same time wherever they differ
        if token and not hmac.compare_digest(given, expected):
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
            "versions": known,
            "workers": pool.workers,
            "queue": queue.used,
            "max_queue": max_queue,
            "limits": vars(limits),
        }

    @api.post(SCORE_PATH)
    async def score(request: Request) -> Response:
        authorise(request).admission.check_not_crowded()
        with memory.claims() as claim_bytes, queue.claims() as claim_videos:
            claim_videos(1)  # at least; how many there are is known when the body is there
            try:
                body = await _body(request, limits.body, upload_timeout, claim_bytes)
                videos, records = decode_request(body, limits)
            except WireError as error:
                raise HTTPException(error.status, str(error)) from None
            claim_videos(len(videos) - 1)
            scores = await _finished(pool.submit(videos, records), request)
        return Response(encode_scores(scores), media_type="application/json")

    return api


async def _body(
    request: Request, limit: int, timeout: float, claim: Callable[[int], None]
) -> bytearray:
    """A request's body. Raises WireError for a wrong type, too much or too slow; keeps only bytes
    that it claimed.
    """
    kind = request.headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != CONTENT_TYPE:
        raise WireError(
            f"content type {kind[:100]!r} is not taken: send {CONTENT_TYPE}, docs/rewards_server.md",
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

    expect(int(request.headers.get("content-length", "0")))  # the HTTP parser lets only digits pass
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


async def _finished(pending: PendingScores, request: Request) -> BatchScores:
    """Waits for the scores; if the client goes away, what has not begun is dropped."""
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


def versions() -> dict[str, str]:
    """Of what a score depends on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


# --- the command ----------------------------------------------------------------------------------

HOST = flags.DEFINE_string(
    "host", "127.0.0.1", "address to listen on; 0.0.0.0 for all, which needs a token"
)
PORT = flags.DEFINE_integer(
    "port", 8080, "port; 0 takes a free one and prints it", lower_bound=0, upper_bound=65535
)
TOKEN_FILE = flags.DEFINE_string("token_file", None, "file that holds the token clients must send")
TOKEN_ENV = flags.DEFINE_string(
    "token_env", "REWARD_TOKEN", "without --token_file: the environment variable that holds it"
)
ALLOW_ALL = flags.DEFINE_bool("allow_all", False, "serve other machines without a token")
WORKERS = flags.DEFINE_integer(
    "workers", max(1, (os.cpu_count() or 2) - 1), "scoring processes", lower_bound=1
)
REWARD = flags.DEFINE_string("reward", "ocr", "ocr, or module:factory of your own")
OPTIONS = flags.DEFINE_string(
    "options", "{}", "JSON object: keyword arguments of a reward of your own"
)
RULE = flags.DEFINE_enum("rule", "spelling", tuple(RULES), "of ocr: as config.reward.rule")
ENGINE = flags.DEFINE_enum("engine", "rapidocr", tuple(ENGINES), "of ocr: as config.reward.engine")
MAX_FRAMES = flags.DEFINE_integer(
    "max_frames", 9, "of ocr: as config.reward.max_frames", lower_bound=2
)
TIMEOUT = flags.DEFINE_float(
    "timeout", 120.0, "seconds for one video, after which its process is replaced", lower_bound=0.01
)
MAX_MIB = flags.DEFINE_integer("max_mib", 512, "largest request, MiB", lower_bound=1)
MAX_QUEUE = flags.DEFINE_integer("max_queue", 1024, "most videos that may wait", lower_bound=1)
MAX_MEMORY_MIB = flags.DEFINE_integer(
    "max_memory_mib", MAX_MEMORY >> 20, "most memory for all requests together, MiB", lower_bound=1
)
UPLOAD_SECONDS = flags.DEFINE_float(
    "upload_timeout", UPLOAD_TIMEOUT, "seconds for a request's body to arrive", lower_bound=0.01
)
GRACE = flags.DEFINE_integer(
    "grace",
    60,
    "seconds that requests under way get to finish when the server is stopped",
    lower_bound=0,
)


class UsageError(Exception):
    """Ends the command with a message and no traceback."""


def make_factory(name: str, options: dict[str, Any]) -> tuple[Callable[[], Any], dict[str, Any]]:
    """(what builds the reward in each worker, what the health page shows of it). Raises UsageError."""
    if name == "ocr":
        return functools.partial(OCRReward, **options), {"name": "ocr", **options}
    module, _, attribute = name.partition(":")
    try:
        factory = getattr(importlib.import_module(module), attribute)
        inspect.signature(factory).bind(**options)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UsageError(
            f"--reward={name} with --options={json.dumps(options)} cannot be built ({error}): give "
            "'ocr', or module:factory that is on PYTHONPATH, and its keyword arguments"
        ) from None
    return functools.partial(factory, **options), {"name": name, **options}


def read_token(token_file: str | None, token_env: str, host: str, allow_all: bool) -> str:
    """The token, "" for none. Raises UsageError without one when other machines could connect."""
    token = os.environ.get(token_env, "").strip()
    if token_file is not None:
        try:
            token = pathlib.Path(token_file).read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--token_file={token_file} cannot be read: {error}") from None
        if not token:
            raise UsageError(f"--token_file={token_file} is empty: write the token into it")
    if not token.isascii() or any(char.isspace() for char in token):
        raise UsageError(
            "the token has characters that no HTTP header can hold: use ASCII letters and digits"
        )
    if not token and not allow_all and not _is_loopback(host):
        raise UsageError(
            f"--host={host} serves other machines, but there is no token: put one into "
            f"--token_file or the environment variable {token_env}, or say --allow_all"
        )
    return token


def _is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def bind(host: str, port: int) -> socket.socket:
    """A bound socket, before seconds are spent on building a reward. Raises UsageError."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        raise UsageError(
            f"--host={host} --port={port} cannot be listened on ({error}): choose another --port"
        ) from None
    return sock


class _Server(uvicorn.Server):
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        # which lets no more connections wait than are accepted in one go
        await super().startup(sockets)
        for sock in sockets or ():
            sock.listen(BACKLOG)


def make_server(
    api: FastAPI, admission: Admission, at_once: int = 32, grace: int | None = None
) -> uvicorn.Server:
    """Serves the application of `make_app`. at_once: connections accepted in one turn of the event
    loop. grace: seconds that requests under way get to finish when the server is stopped.
    """
    config = uvicorn.Config(
        api,
        http=functools.partial(Connection, admission),
        loop="asyncio",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        log_level="error",  # a warning for each malformed request would let anyone fill the log
        backlog=at_once,
        timeout_keep_alive=admission.keep_alive,
        timeout_graceful_shutdown=grace,
    )
    return _Server(config)


def serve(server: uvicorn.Server, sock: socket.socket) -> None:
    """Answers until SIGTERM or SIGINT, then lets the requests under way finish."""
    # uvicorn raises the signal again when it is done
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    server.run(sockets=[sock])


def main(_):
    name, options = (
        REWARD.value,
        {"rule": RULE.value, "engine": ENGINE.value, "max_frames": MAX_FRAMES.value},
    )
    if name != "ocr":
        try:
            options = json.loads(OPTIONS.value)
        except ValueError as error:
            raise UsageError(f"--options={OPTIONS.value} is not JSON: {error}") from None
        if not isinstance(options, dict):
            raise UsageError(
                f'--options={OPTIONS.value} is not a JSON object: write {{"name": value, ...}}'
            )
    if MAX_MEMORY_MIB.value < MAX_MIB.value:
        raise UsageError(
            f"--max_memory_mib={MAX_MEMORY_MIB.value} is less than --max_mib={MAX_MIB.value}: "
            "allow at least one request"
        )
    token = read_token(TOKEN_FILE.value, TOKEN_ENV.value, HOST.value, ALLOW_ALL.value)
    factory, about = make_factory(name, options)
    sock = bind(HOST.value, PORT.value)
    try:
        connections, at_once = connection_limits(WORKERS.value)
    except ValueError as error:
        raise UsageError(str(error)) from None
    try:
        pool = RewardPool(factory, WORKERS.value, timeout=TIMEOUT.value)
    except RewardError as error:
        raise UsageError(
            f"the reward cannot be built: {str(error).strip().splitlines()[-1]}"
        ) from None
    with pool:
        sock.listen(BACKLOG)  # from here on a client that connects is answered
        print(
            f"reward server on http://{HOST.value}:{sock.getsockname()[1]} with {WORKERS.value} "
            f"workers: {json.dumps(about)}{'' if token else ', no token'}",
            flush=True,
        )
        api = make_app(
            pool,
            about,
            token,
            Limits(body=MAX_MIB.value << 20),
            max_queue=MAX_QUEUE.value,
            max_memory=MAX_MEMORY_MIB.value << 20,
            upload_timeout=UPLOAD_SECONDS.value,
        )
        serve(make_server(api, Admission(connections), at_once, GRACE.value), sock)


def run() -> None:
    try:
        app.run(main)
    except UsageError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    run()

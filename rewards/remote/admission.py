"""Admission of connections and requests to a reward server, so that clients with the token always
get through, whatever others send.

uvicorn waits for a request's header without a time limit, and its `limit_concurrency` counts every
connection, so silent connections would shut clients out. Here, a connection must show the token
within seconds. When there are too many connections, the oldest one that has not shown the token is
closed for the newest one. A client sends its token as soon as it is connected, so it gets through.

    state       meaning                            closed
    untrusted   no request with the token yet      after `header_timeout`, or to make room
    busy        such a request is under way        never; at most half of all connections
    idle        the last such request is answered  after `keep_alive`, or to make room
"""

import asyncio
import contextlib
import logging
import os
import resource
from collections.abc import Callable, Iterator

from fastapi import HTTPException
from uvicorn.protocols.http.h11_impl import H11Protocol

log = logging.getLogger("rewards.server")

HEADER_TIMEOUT = 10.0  # seconds until a connection must have shown the token
KEEP_ALIVE = 75  # seconds until an idle connection is closed; there are pauses between epochs
MAX_CONNECTIONS = 2048  # where the limit of open files allows as many
MIN_CONNECTIONS = 8
MAX_ACCEPTED = 32  # connections accepted in one turn of the event loop


class Admission:
    """The open connections of one server. Used on the event loop's thread only.

    limit: largest number of connections. header_timeout, keep_alive: seconds, see the table above.
    """

    def __init__(
        self, limit: int, header_timeout: float = HEADER_TIMEOUT, keep_alive: float = KEEP_ALIVE
    ):
        self.limit, self.header_timeout, self.keep_alive = limit, header_timeout, keep_alive
        # Dictionaries keep the order of insertion: the first connection has been there for longest.
        self.untrusted: dict[Connection, None] = {}
        self.idle: dict[Connection, None] = {}
        self.busy: dict[Connection, None] = {}
        self._warned: set[str] = set()

    def check_not_crowded(self) -> None:
        """Answer a request with 503 if requests under way use half of the connections: the rest is
        needed to answer anybody at all.
        """
        if len(self.busy) > self.limit // 2:
            self.warn(
                f"requests are answered with 503 while {self.limit // 2} others are under way, "
                "half of the connections: raise the limit of open files (ulimit -n) if clients "
                "wait for long"
            )
            raise server_busy(
                f"{self.limit // 2} requests are under way, half of the connections that the "
                "server can have"
            )

    def make_room(self) -> None:
        """Close a connection if there are too many. The newest one is untrusted and stays."""
        if len(self.untrusted) + len(self.idle) + len(self.busy) <= self.limit:
            return
        self.warn(
            f"{self.limit} connections are open: the oldest ones without a request that carries "
            "the token are closed. If they belong to your clients, raise the limit of open files: "
            "ulimit -n"
        )
        oldest = next(iter(self.untrusted))
        if len(self.untrusted) == 1 and self.idle:
            oldest = next(iter(self.idle))
        oldest.abort()

    def warn(self, message: str) -> None:
        """Log a message the first time it is given: an attack must not fill the disk."""
        if message not in self._warned:
            self._warned.add(message)
            log.warning("%s (logged once)", message)


class Connection(H11Protocol):
    """A connection to uvicorn, with a deadline. The application gets it as
    `request.state.connection`.
    """

    def __init__(self, admission: Admission, config, server_state, app_state, _loop=None):
        super().__init__(config, server_state, {**app_state, "connection": self}, _loop)
        self.admission = admission
        self._group: dict[Connection, None] = admission.untrusted
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._enter(self.admission.untrusted, self.admission.header_timeout)
        self.admission.make_room()

    def authorised(self) -> None:
        """Record that the request under way carries the token. The application calls this."""
        if not self.transport.is_closing():  # a closed connection would stay in the group for ever
            self._enter(self.admission.busy, None)

    def on_response_complete(self) -> None:
        # uvicorn closes connections that are silent for `keep_alive`. This also closes those that
        # send a byte now and then.
        if self._group is self.admission.busy:
            self._enter(
                self.admission.idle, self.admission.keep_alive + self.admission.header_timeout
            )
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._leave()
        super().connection_lost(exc)

    def abort(self) -> None:
        """Close the connection at once, also if the client does not read what it is sent."""
        self._leave()
        self.transport.abort()

    def _enter(self, group: "dict[Connection, None]", seconds: float | None) -> None:
        self._leave()
        self._group = group
        group[self] = None
        if seconds is not None:
            self._timer = self.loop.call_later(seconds, self._expire)

    def _leave(self) -> None:
        self._group.pop(self, None)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expire(self) -> None:
        if self._group is self.admission.untrusted:
            self.admission.warn(
                f"a connection was closed that sent no request with the token within "
                f"{self.admission.header_timeout:g} s"
            )
        self.abort()


class Quota:
    """A limit on a resource of all requests together. Used on the event loop's thread only.

    unit: what is counted. fix: the setting that raises the limit. Both are for messages.
    """

    def __init__(self, limit: int, unit: str, fix: str):
        self.limit, self.unit, self.fix, self.used = limit, unit, fix, 0
        self._warned = False

    @contextlib.contextmanager
    def claims(self) -> Iterator[Callable[[int], None]]:
        """Give one request a function `claim(count)`, which takes `count` units until the end of
        the context.

        It answers the request with 503 if other requests leave too few units. A request that is
        alone gets as many as it asks for.
        """
        claimed = 0

        def claim(count: int) -> None:
            nonlocal claimed
            if self.used > claimed and self.used + count > self.limit:
                if not self._warned:
                    self._warned = True
                    log.warning(
                        "requests are answered with 503 when they need more than %d %s together: "
                        "raise %s if clients wait for long (logged once)",
                        self.limit,
                        self.unit,
                        self.fix,
                    )
                raise server_busy(
                    f"{self.used} {self.unit} are used by requests, and {count} more would exceed "
                    f"the limit of {self.limit}"
                )
            claimed += count
            self.used += count

        try:
            yield claim
        finally:
            self.used -= claimed


def server_busy(reason: str) -> HTTPException:
    """Return the answer 503, which asks a client to come back later."""
    return HTTPException(503, f"{reason}: try again later", {"Retry-After": "1"})


def connection_limits(workers: int) -> tuple[int, int]:
    """Return (largest number of connections, connections to accept in a turn of the event loop).

    Both follow from the limit of open files, which is raised as far as this process may. Raises
    `ValueError` if the limit is too low for a server with `workers` worker processes.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # some systems refuse their own hard limit
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    # files that are open now, of the event loop, and of the workers and their replacements
    reserved = len(os.listdir("/dev/fd")) + 8 + 5 * workers
    free = MAX_CONNECTIONS * 2 if soft == resource.RLIM_INFINITY else soft - reserved
    accepted = max(1, min(MAX_ACCEPTED, free // 10))
    # A surplus connection keeps its file for 3 turns of the event loop.
    limit = min(MAX_CONNECTIONS, free - 5 * accepted)
    if limit < MIN_CONNECTIONS:
        raise ValueError(
            f"this process may open {soft} files, too few for {workers} workers and their clients: "
            f"allow it {reserved + 4 * MIN_CONNECTIONS} or more (ulimit -n), or use fewer --workers"
        )
    return limit, accepted

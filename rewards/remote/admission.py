"""Which connections and requests a reward server admits, so that strangers cannot shut its clients
out.

uvicorn waits for a request's header without a limit of time, and its `limit_concurrency` counts
every connection, so that silent ones would have clients refused. Here a connection must show the
token within seconds, and when there are too many connections, the oldest one that has not shown it
makes room for the newest one. A client sends its token as soon as it is connected, so it gets
through whatever the others do.

    stranger    no request with the token yet           closed after `header_timeout`, or to make
                room
    busy        such a request is under way             never closed; at most half of all
                connections
    idle        the last such request is answered       closed after `keep_alive`, or to make room
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
KEEP_ALIVE = 75  # seconds an idle connection is kept; epochs often leave pauses
MAX_CONNECTIONS = 2048  # where the limit of open files allows them
FEWEST_CONNECTIONS = 8
MOST_AT_ONCE = 32  # connections accepted in one turn of the event loop


class Admission:
    """The open connections of one server. All on the event loop's thread.

    limit: most connections. The seconds are those of the table above.
    """

    def __init__(
        self, limit: int, header_timeout: float = HEADER_TIMEOUT, keep_alive: float = KEEP_ALIVE
    ):
        self.limit, self.header_timeout, self.keep_alive = limit, header_timeout, keep_alive
        # oldest first, as dictionaries keep the order of insertion
        self.strangers: dict[Connection, None] = {}
        self.idle: dict[Connection, None] = {}  # longest idle first
        self.busy: dict[Connection, None] = {}
        self._warned: set[str] = set()

    def check_not_crowded(self) -> None:
        """Answers a request with 503 where requests under way take so many connections that no room
        would be left to answer others at all.
        """
        if len(self.busy) > self.limit // 2:
            self.warn(
                f"requests are answered with 503 while {self.limit // 2} others are under way, "
                "half of the connections: raise the limit of open files (ulimit -n) if clients "
                "wait for long"
            )
            raise busy(
                f"{self.limit // 2} requests are under way, half of the connections that the "
                "server can hold"
            )

    def make_room(self) -> None:
        """Closes one connection where there are too many; the newest one is a stranger."""
        if len(self.strangers) + len(self.idle) + len(self.busy) <= self.limit:
            return
        self.warn(
            f"{self.limit} connections are open: the oldest ones without a request that carries "
            "the token are closed. If these are clients of yours, raise the limit of open files: "
            "ulimit -n"
        )
        oldest = next(iter(self.strangers))
        if len(self.strangers) == 1 and self.idle:
            oldest = next(iter(self.idle))
        oldest.abort()

    def warn(self, message: str) -> None:
        """Logs a message the first time it is given: an attack must not fill the disk."""
        if message not in self._warned:
            self._warned.add(message)
            log.warning("%s (said once)", message)


class Connection(H11Protocol):
    """One connection to uvicorn, with a deadline. The application finds it as
    `request.state.connection`.
    """

    def __init__(self, admission: Admission, config, server_state, app_state, _loop=None):
        super().__init__(config, server_state, {**app_state, "connection": self}, _loop)
        self.admission = admission
        self._group: dict[Connection, None] = admission.strangers
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._enter(self.admission.strangers, self.admission.header_timeout)
        self.admission.make_room()

    def authorised(self) -> None:
        """The application says that the request under way carries the token."""
        if not self.transport.is_closing():  # else it would never leave the group again
            self._enter(self.admission.busy, None)

    def on_response_complete(self) -> None:
        # uvicorn ends what is silent for `keep_alive`, this what trickles
        if self._group is self.admission.busy:
            self._enter(
                self.admission.idle, self.admission.keep_alive + self.admission.header_timeout
            )
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._leave()
        super().connection_lost(exc)

    def abort(self) -> None:
        """Closes the connection at once, also where the client does not read what it is sent."""
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
        if self._group is self.admission.strangers:
            self.admission.warn(
                f"a connection was closed that sent no request with the token within "
                f"{self.admission.header_timeout:g} s"
            )
        self.abort()


class Quota:
    """How much of something all requests together may hold. All on the event loop's thread.

    unit: what is counted. fix: what raises the limit; both for messages.
    """

    def __init__(self, limit: int, unit: str, fix: str):
        self.limit, self.unit, self.fix, self.used = limit, unit, fix, 0
        self._warned = False

    @contextlib.contextmanager
    def claims(self) -> Iterator[Callable[[int], None]]:
        """Gives `claim(count)`, which answers the request with 503 where the others leave too
        little for it. A request that is alone gets whatever it asks for. What was claimed is free
        again at the end.
        """
        mine = 0

        def claim(count: int) -> None:
            nonlocal mine
            if self.used > mine and self.used + count > self.limit:
                if not self._warned:
                    self._warned = True
                    log.warning(
                        "requests are answered with 503 when they hold more than %d %s together: "
                        "raise %s if clients wait for long (said once)",
                        self.limit,
                        self.unit,
                        self.fix,
                    )
                raise busy(
                    f"{self.used} {self.unit} are held by requests, and {count} more would exceed "
                    f"the limit of {self.limit}"
                )
            mine += count
            self.used += count

        try:
            yield claim
        finally:
            self.used -= mine


def busy(reason: str) -> HTTPException:
    """The answer that asks a client to come back."""
    return HTTPException(503, f"{reason}: ask again later", {"Retry-After": "1"})


def connection_limits(workers: int) -> tuple[int, int]:
    """(most connections, most to accept in a turn of the event loop), from the limit of open files,
    which is raised as far as this process may. Raises ValueError where it is too low for a server
    with `workers` worker processes.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # some systems refuse their own hard limit
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    # open now; for the event loop; workers and their successors
    taken = len(os.listdir("/dev/fd")) + 8 + 5 * workers
    free = MAX_CONNECTIONS * 2 if soft == resource.RLIM_INFINITY else soft - taken
    at_once = max(1, min(MOST_AT_ONCE, free // 10))
    # a file is closed 3 turns after its connection was one too many
    limit = min(MAX_CONNECTIONS, free - 5 * at_once)
    if limit < FEWEST_CONNECTIONS:
        raise ValueError(
            f"this process may open {soft} files, too few for {workers} workers and their clients: "
            f"allow it {taken + 4 * FEWEST_CONNECTIONS} or more (ulimit -n), or use fewer --workers"
        )
    return limit, at_once

"""A client of several HTTP servers that do the same work: it chooses the server for each request,
repeats requests that fail, and gives up when no server works.

    situation                     consequence
    a request is to be sent       the server with the fewest requests under way gets it
    its server fails              the server is down; the request goes to another one
    a server is down              it is probed, with growing pauses, and used again once it works
    all servers are down          requests wait; after `patience` seconds all of them fail, and new
                                  ones fail at once until a server is back
    a server is busy (429, 503)   it is asked again after a pause, and is not down

So a dead server costs one retry, a restart of all servers costs a wait, and an outage costs
`patience` seconds once, not once per video.
"""

import dataclasses
import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from rewards.base import RewardError
from rewards.remote.connections import Answer, Connections
from rewards.remote.wire import load_json, printable

log = logging.getLogger("rewards.remote")

PROBE_TIMEOUT = 5.0  # seconds
# seconds between two probes, and between two requests to busy servers
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 8.0
# HTTP statuses
BUSY = (429, 503)
REFUSED = (400, 413, 415, 422)  # the request is at fault: any server would refuse it
FORBIDDEN = (401, 403)
MISSING = (404, 405)


def pause(attempt: int, chance: float, first: float = FIRST_PAUSE) -> float:
    """Return the seconds to wait before attempt 1, 2, ...: doubling from `first` to LONGEST_PAUSE.

    `chance` in [0, 1) shortens the pause by up to half, so that the clients of a restarted server
    do not all come at once.
    """
    return min(LONGEST_PAUSE, first * 2 ** (min(attempt, 16) - 1)) * (1 - 0.5 * chance)


class _ServerFailed(Exception):
    """The server did not do its work."""


class _WrongServer(_ServerFailed):
    """The server would not do its work later either: the token or the address is wrong."""


class _ServerBusy(Exception):
    """The server asks its clients to come back later."""


@dataclasses.dataclass(eq=False)
class _Server:
    """The state of one server, guarded by the lock of its `Endpoints`."""

    url: str
    connections: Connections
    error: str = "not probed yet"  # "" while it is up
    outstanding: int = 0  # requests under way
    last_used: int = 0  # number of the last request, to take turns
    probes: int = 0  # since it went down
    next_probe: float = 0.0  # time.monotonic()


class Endpoints:
    """A client of the servers at `urls`, for any number of threads.

    probe_path: path of the GET request that shows whether a server works.
    check: called with the probe's answer, parsed from JSON; raises `RewardError` if the server is
        not the expected one.
    token: sent as bearer token; "" sends none. No message and no log contains it.
    timeout: seconds for one request and its answer.
    retries: number of further attempts after a failure.
    patience: seconds to wait while no server works, or while a server is busy.
    first_pause, seed: of the pauses, see `pause`.

    The constructor probes all servers. It raises `ValueError` for an unusable URL, `RewardError` if
    no server works or one is not as expected (a wrong token is found here). Servers that do not
    answer yet are used once they do.
    """

    def __init__(
        self,
        urls: Sequence[str],
        probe_path: str,
        check: Callable[[Any], None],
        *,
        token: str = "",
        timeout: float = 60.0,
        retries: int = 3,
        patience: float = 120.0,
        first_pause: float = FIRST_PAUSE,
        seed: int | None = None,
    ):
        if isinstance(urls, str) or not urls:
            raise ValueError(
                f"servers {urls!r}: give a list of one or more URLs, such as http://host:8080"
            )
        if not (timeout > 0 and retries >= 0 and patience >= 0 and first_pause > 0):
            raise ValueError(
                f"timeout={timeout} and first_pause={first_pause} must be above 0, "
                f"retries={retries} and patience={patience} at least 0"
            )
        if not token.isascii() or any(char.isspace() or not char.isprintable() for char in token):
            raise ValueError(
                "the token has characters that no HTTP header can have: use ASCII letters and "
                "digits"
            )
        self._servers = [_Server(url, Connections(url)) for url in dict.fromkeys(urls)]
        self._probe_path, self._check, self._timeout = probe_path, check, timeout
        self._retries, self._patience, self._first_pause = retries, patience, first_pause
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._random = random.Random(seed)
        self._changed = threading.Condition()  # guards everything below, and the servers
        self._requests = 0  # number of the last request
        self._all_down_since = time.monotonic()
        self._watching, self._closed = False, False
        try:
            self._first_probes()
        except BaseException:
            self.close()
            raise

    # ---- Requests --------------------------------------------------------------------------------

    def post(self, path: str, body: Sequence[bytes | memoryview], content_type: str) -> Any:
        """Send a request that may be repeated, and return its answer, parsed from JSON. Raises
        `RewardError` when no server gives one.
        """
        headers = self._headers | {"Content-Type": content_type}
        tried, errors, busy, deadline = set(), [], 0, None
        while len(errors) <= self._retries:
            server = self._take(tried)
            try:
                return _parse(
                    server.connections.exchange("POST", path, headers, body, timeout=self._timeout)
                )
            except _ServerBusy as error:
                busy, deadline = busy + 1, deadline or time.monotonic() + self._patience
                if time.monotonic() >= deadline:
                    raise RewardError(
                        f"reward server {server.url} was busy for {self._patience:g} s ({error}): "
                        "start more servers or workers, or have fewer videos in flight"
                    ) from None
                self._sleep(self._pause(busy))
            except (_ServerFailed, OSError) as error:
                tried.add(server)
                errors.append(f"{server.url}: {_message(error)}")
                self._down(server, _message(error))
            except RewardError as error:
                raise RewardError(f"reward server {server.url} {error}") from None
            finally:
                self._done(server)
        raise RewardError(
            f"no reward server scored it in {len(errors)} attempts: {'; '.join(errors)}"
        )

    def close(self) -> None:
        """End the waiting of all threads, each with a `RewardError`."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for server in self._servers:
            server.connections.close()

    def _take(self, tried: set[_Server]) -> _Server:
        """Choose the server for a request, those of `tried` last; wait while none works."""
        with self._changed:
            while True:
                self._check_open()
                working = [server for server in self._servers if not server.error]
                if working:
                    best = min(
                        working,
                        key=lambda server: (server in tried, server.outstanding, server.last_used),
                    )
                    self._requests += 1
                    best.outstanding, best.last_used = best.outstanding + 1, self._requests
                    return best
                left = self._all_down_since + self._patience - time.monotonic()
                if left <= 0:
                    raise RewardError(
                        f"no reward server works, for more than {self._patience:g} s: "
                        f"{self._errors()}"
                    )
                self._changed.wait(left)

    def _done(self, server: _Server) -> None:
        with self._changed:
            server.outstanding -= 1

    def _sleep(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed, seconds)
            self._check_open()

    def _check_open(self) -> None:
        if self._closed:
            raise RewardError("the client of the reward servers is closed")

    def _errors(self) -> str:
        return "; ".join(
            f"{server.url}: {server.error}" for server in self._servers if server.error
        )

    def _pause(self, attempt: int) -> float:
        return pause(attempt, self._random.random(), self._first_pause)

    # ---- State of the servers --------------------------------------------------------------------

    def _first_probes(self) -> None:
        """Probe all servers. Raises `RewardError` if none works, or one is not as expected."""
        unexpected = []
        for server in self._servers:
            try:
                self._probe(server)
                server.error = ""
            except (_WrongServer, RewardError) as error:
                unexpected.append(f"{server.url}: {error}")
            except (_ServerFailed, _ServerBusy, OSError) as error:
                server.error = _message(error)
        if unexpected:
            raise RewardError("; ".join(unexpected))
        if all(server.error for server in self._servers):
            raise RewardError(
                f"no reward server works: {self._errors()}. Start one with python -m "
                "rewards.server, or correct the URL"
            )
        with self._changed:
            for server in self._servers:
                if server.error:
                    self._mark_down(server, server.error)

    def _probe(self, server: _Server) -> None:
        """Raise an error unless the server works and is the expected one."""
        answer = server.connections.exchange(
            "GET", self._probe_path, self._headers, timeout=PROBE_TIMEOUT
        )
        self._check(_parse(answer))

    def _down(self, server: _Server, error: str) -> None:
        with self._changed:
            if not server.error and not self._closed:
                self._mark_down(server, error)

    def _mark_down(self, server: _Server, error: str) -> None:
        """Record that a server is down. The caller holds the lock."""
        log.warning("reward server %s is not used for now: %s", server.url, error)
        server.error, server.probes = error, 1
        server.next_probe = time.monotonic() + self._pause(1)
        if all(other.error for other in self._servers):
            self._all_down_since = time.monotonic()
        if not self._watching:
            self._watching = True
            threading.Thread(target=self._watch, name="reward servers", daemon=True).start()
        self._changed.notify_all()

    def _watch(self) -> None:
        """Probe the servers that are down, until all work."""
        while True:
            with self._changed:
                down = [server for server in self._servers if server.error]
                if self._closed or not down:
                    self._watching = False
                    return
                server = min(down, key=lambda server: server.next_probe)
                left = server.next_probe - time.monotonic()
                if left > 0:
                    self._changed.wait(left)
                    continue
            try:
                self._probe(server)
                error = ""
            except Exception as reason:  # any error means that the server is down: go on probing
                error = _message(reason)
            with self._changed:
                if self._closed:  # the probe may have failed because of that
                    continue
                if error and error != server.error:  # e.g. other settings after a restart
                    log.warning("reward server %s is still not used: %s", server.url, error)
                server.error, server.probes = error, server.probes + 1
                server.next_probe = time.monotonic() + self._pause(server.probes)
                if not error:
                    log.warning("reward server %s works again", server.url)
                    self._changed.notify_all()


def _parse(answer: Answer) -> Any:
    """Parse an answer's JSON. Raises `_ServerBusy`, `RewardError` if the request was refused, or
    `_ServerFailed` for anything else.
    """
    if 200 <= answer.status < 300:
        try:
            return load_json(answer.body)
        except ValueError as error:
            raise _ServerFailed(
                f"answered something else than JSON ({error}): {answer.body[:200]!r}"
            ) from None
    detail = f"{answer.status} {_detail(answer.body)}".strip()
    if answer.status in BUSY:
        raise _ServerBusy(detail)
    if answer.status in REFUSED:
        raise RewardError(f"refused the request: {detail}")
    if answer.status in FORBIDDEN:
        raise _WrongServer(
            f"refused the token ({detail}): put the server's token in the environment variable "
            "that config.reward.token_env names"
        )
    raise (_WrongServer if answer.status in MISSING else _ServerFailed)(f"answered {detail}")


def _detail(body: bytes) -> str:
    """Return the error message in an answer of FastAPI or of an OpenAI-compatible server, else the
    answer's text.
    """
    text = body[:10_000].decode("utf-8", "replace")
    try:
        answer = load_json(body)
        detail = answer.get("detail") or answer.get("error") or answer.get("message") or text
        detail = detail.get("message", detail) if isinstance(detail, dict) else detail
    except (ValueError, AttributeError):
        detail = text
    return printable(str(detail))


def _message(error: Exception) -> str:
    return printable(str(error)) or type(error).__name__

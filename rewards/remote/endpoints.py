"""Several HTTP servers that do the same work: which one to ask, when to ask again, when to give up.

    ask the server with the fewest requests under way    it fails: it is down, and the request goes
                                                         to another one
    a down server is probed with growing pauses          it answers as it should: it is used again
    all servers are down                                 requests wait; after `patience` seconds all
                                                         of them fail, and
                                                         further ones at once, until a server is
                                                         back

So a dead server costs a retry, a restart of all of them costs a wait, and an outage costs
`patience` seconds once and not once a video. A server that is merely busy (429, 503) is asked again
after a pause and is not down.
"""

import dataclasses
import http.client
import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from rewards.base import RewardError
from rewards.remote.connections import Answer, Connections
from rewards.remote.received import load_json, printable

log = logging.getLogger("rewards.remote")

PROBE_TIMEOUT = 5.0  # seconds
# seconds between two probes, and between two requests to busy servers
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 8.0
BUSY = (429, 503)
REFUSED = (400, 413, 415, 422)  # the request is at fault: any server would answer the same


def pause(attempt: int, chance: float, first: float = FIRST_PAUSE) -> float:
    """Seconds before attempt 1, 2, ...: doubling up to LONGEST_PAUSE, of which `chance` in [0, 1)
    takes up to half, so that the clients of a restarted server do not all come at once.
    """
    return min(LONGEST_PAUSE, first * 2 ** (min(attempt, 16) - 1)) * (1 - 0.5 * chance)


class _Failed(Exception):
    """The server did not do its work."""


class _Misplaced(_Failed):
    """The server would not do it later either: a wrong token or address."""


class _Busy(Exception):
    """The server asks to come back later."""


@dataclasses.dataclass(eq=False)
class _Server:
    url: str
    connections: Connections
    error: str = "not asked yet"  # "" while it is up
    outstanding: int = 0  # requests under way
    last_used: int = 0  # number of the last request, to take turns
    probes: int = 0  # since it went down
    next_probe: float = 0.0  # time.monotonic()


class Endpoints:
    """A client of all `urls`, for any number of threads.

    probe_path: what a GET is sent to, to see whether a server works; check(answer as JSON) raises
    RewardError if it
        is not the server that was expected.
    token: sent as bearer token; "" sends none. It is in no message and no log. timeout: seconds for
    one request and its answer. retries: further servers asked after a failure. patience: seconds to
    wait when no server works. first_pause: seconds, see `pause`. seed: of the pauses.

    All servers are probed at once. Raises ValueError for an unusable URL, RewardError if no server
    works or one is not as expected (a wrong token is found here); those that do not answer are used
    when they come up.
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
                "the token has characters that no HTTP header can hold: use ASCII letters and "
                "digits"
            )
        self._servers = [_Server(url, Connections(url)) for url in dict.fromkeys(urls)]
        self._probe_path, self._check, self._timeout = probe_path, check, timeout
        self._retries, self._patience, self._first_pause = retries, patience, first_pause
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._random = random.Random(seed)
        self._changed = threading.Condition()  # guards everything below, and the servers
        self._requests, self._all_down_since, self._watching, self._closed = (
            0,
            time.monotonic(),
            False,
            False,
        )
        try:
            self._first_probes()
        except BaseException:
            self.close()
            raise

    # ---- asking ----------------------------------------------------------------------------------

    def post(self, path: str, body: Sequence[bytes | memoryview], content_type: str) -> Any:
        """The answer to a request that may be repeated, from JSON. Raises RewardError when there is
        none.
        """
        headers = self._headers | {"Content-Type": content_type}
        tried, errors, busy, deadline = set(), [], 0, None
        while len(errors) <= self._retries:
            server = self._take(tried)
            try:
                return _parse(
                    server.connections.exchange("POST", path, headers, body, timeout=self._timeout)
                )
            except _Busy as error:
                busy, deadline = busy + 1, deadline or time.monotonic() + self._patience
                if time.monotonic() >= deadline:
                    raise RewardError(
                        f"reward server {server.url} was busy for {self._patience:g} s ({error}): "
                        "start more servers or workers, or have fewer videos in flight"
                    ) from None
                self._sleep(self._pause(busy))
            except (_Failed, OSError, http.client.HTTPException) as error:
                tried.add(server)
                errors.append(f"{server.url}: {_say(error)}")
                self._down(server, _say(error))
            except RewardError as error:
                raise RewardError(f"reward server {server.url} {error}") from None
            finally:
                self._done(server)
        raise RewardError(f"no reward server did it in {len(errors)} attempts: {'; '.join(errors)}")

    def close(self) -> None:
        """Ends what waits, in all threads; each gets a RewardError."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for server in self._servers:
            server.connections.close()

    def _take(self, tried: set[_Server]) -> _Server:
        """The best server that works, waiting for one if need be; those of `tried` last."""
        with self._changed:
            while True:
                self._check_open()
                up = [server for server in self._servers if not server.error]
                if up:
                    best = min(
                        up,
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

    # ---- which servers work ----------------------------------------------------------------------

    def _first_probes(self) -> None:
        unexpected = []
        for server in self._servers:
            try:
                self._probe(server)
                server.error = ""
            except (_Misplaced, RewardError) as error:
                unexpected.append(f"{server.url}: {error}")
            except (_Failed, _Busy, OSError, http.client.HTTPException) as error:
                server.error = _say(error)
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
        answer = server.connections.exchange(
            "GET", self._probe_path, self._headers, timeout=PROBE_TIMEOUT
        )
        self._check(_parse(answer))

    def _down(self, server: _Server, error: str) -> None:
        with self._changed:
            if not server.error and not self._closed:
                self._mark_down(server, error)

    def _mark_down(self, server: _Server, error: str) -> None:
        """Called with the lock held."""
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
        """Probes what is down until nothing is."""
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
            except Exception as reason:  # whatever it is, this thread must go on
                error = _say(reason)
            with self._changed:
                if error and error != server.error:  # such as other settings after a restart
                    log.warning("reward server %s is still not used: %s", server.url, error)
                server.error, server.probes = error, server.probes + 1
                server.next_probe = time.monotonic() + self._pause(server.probes)
                if not error:
                    log.warning("reward server %s works again", server.url)
                    self._changed.notify_all()


def _parse(answer: Answer) -> Any:
    """An answer's JSON. Raises _Busy, RewardError if the request was refused, _Failed for all else."""
    if 200 <= answer.status < 300:
        try:
            return load_json(answer.body)
        except ValueError as error:
            raise _Failed(
                f"answered something else than JSON ({error}): {answer.body[:200]!r}"
            ) from None
    detail = f"{answer.status} {_detail(answer.body)}".strip()
    if answer.status in BUSY:
        raise _Busy(detail)
    if answer.status in REFUSED:
        raise RewardError(f"refused the request: {detail}")
    if answer.status in (401, 403):
        raise _Misplaced(
            f"refused the token ({detail}): put the server's token in the environment variable "
            "that config.reward.token_env names"
        )
    raise (_Misplaced if answer.status in (404, 405) else _Failed)(f"answered {detail}")


def _detail(body: bytes) -> str:
    """What FastAPI and OpenAI-compatible servers say of an error, else the text."""
    text = body[:10_000].decode("utf-8", "replace")
    try:
        answer = load_json(body)
        found = answer.get("detail") or answer.get("error") or answer.get("message") or text
        found = found.get("message", found) if isinstance(found, dict) else found
    except (ValueError, AttributeError):
        found = text
    return printable(str(found))


def _say(error: Exception) -> str:
    if isinstance(error, http.client.BadStatusLine) and not isinstance(error, ConnectionError):
        return f"answered something else than HTTP: {printable(repr(error.line))}"
    return printable(str(error)) or type(error).__name__

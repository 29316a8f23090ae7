"""Detects that a process of a run on several hosts died or hangs, and ends the others with one
line.

Every process writes a heartbeat with its current stage into the coordinator's key-value store, and
reads the heartbeats of all. A collective blocks for ever when a process is gone, so all of this
runs on threads of its own.
"""

import dataclasses
import json
import os
import socket
import sys
import threading
import time
from typing import Protocol

RUN_AGAIN = "everything saved so far is whole: run the same command again, on fewer hosts too"


class Store(Protocol):
    """The part of JAX's distributed client that is used: strings by key, on the coordinator."""

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None: ...
    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]: ...


@dataclasses.dataclass
class Peer:
    """What is known of a process: its last heartbeat, and when that arrived, by our clock."""

    number: int = -1  # of the heartbeat
    at: float = 0.0  # arrival, seconds
    host: str = "?"
    stage: str = "starting"
    count: int = 0  # stages begun: the process with the fewest holds up the others
    seconds: float = 0.0  # in this stage


def verdict(
    peers: dict[int, Peer], answered: float, now: float, timeout: float, stage_timeout: float
) -> str | None:
    """Return what is wrong, in one line, or None.

    Args:
        peers: what is known of every process.
        answered: when the store answered last, by this process's clock, as `now`.
        now: the current time.
        timeout: seconds of silence after which a process is reported.
        stage_timeout: seconds in which some process must begin a new stage; 0 for no limit.
    """
    if now - answered > timeout:
        return (
            f"process 0 on {peers[0].host}, the coordinator, has not answered for "
            f"{now - answered:.0f} s: it died, hangs, or the network is down; {RUN_AGAIN}"
        )
    silent = [p for p in sorted(peers) if now - peers[p].at > timeout]
    if silent:
        names = ", ".join(f"process {p} on {peers[p].host}" for p in silent[:4]) + ", ..." * (
            len(silent) > 4
        )
        last = peers[silent[0]]
        return (
            f"{names} {'has' if len(silent) == 1 else 'have'} not been heard of for "
            f"{now - last.at:.0f} s (last in '{last.stage}'): died, hangs, or lost the network; "
            f"{RUN_AGAIN}"
        )
    slowest = min(peers, key=lambda p: (peers[p].count, p))
    if stage_timeout and all(peer.seconds > stage_timeout for peer in peers.values()):
        peer = peers[slowest]
        return (
            f"no process has got any further for {stage_timeout:.0f} s; process {slowest} on "
            f"{peer.host} is furthest behind, in '{peer.stage}'; {RUN_AGAIN}, with a longer "
            "--stage_timeout if nothing hung"
        )
    return None


class Watch:
    """Two threads: one exchanges heartbeats, which may block for ever, the other evaluates them."""

    def __init__(
        self,
        store: Store,
        process: int,
        processes: int,
        *,
        timeout: float,
        stage_timeout: float,
    ):
        """process, processes: index of this one and number of all. Seconds as in `verdict`."""
        self.store = store
        self.process = process
        self.host = socket.gethostname()
        self.timeout = timeout
        self.stage_timeout = stage_timeout
        self.interval = min(max(timeout / 20, 0.1), 2.0)
        # The stage of this process, since when, and the number of stages begun.
        now = time.monotonic()
        self.current = "starting"
        self.begun = now
        self.count = 0
        # What is known of all processes.
        self.peers = {p: Peer(at=now) for p in range(processes)}
        self.answered = now
        self.number = 0
        self.ending = threading.Lock()
        self.closed = threading.Event()
        for work in (self._beat, self._judge):
            threading.Thread(target=work, name=f"hosts{work.__name__}", daemon=True).start()

    def stage(self, name: str) -> None:
        """Record that this process begins a stage."""
        self.current = name
        self.begun = time.monotonic()
        self.count += 1

    def close(self) -> None:
        """Stop watching, before a normal end."""
        self.closed.set()

    def lost(self) -> str | None:
        """Return whether another process is gone, as in `verdict`. For the main thread, after an
        error of unknown cause.

        A broken connection fails a collective at once, so a silence much shorter than the timeout
        is enough.
        """
        silence = min(3 * self.interval, self.timeout)
        time.sleep(silence + 2 * self.interval)
        return verdict(self.peers, self.answered, time.monotonic(), silence, 0)

    def fail(self, text: str, code: int = 1, shown: str | None = None) -> None:
        """End this process without waiting for the others, after reporting the reason to them.

        text: the reason; ignored if another process was first. shown: what is printed here, if not
        `text`.
        """
        if not self.ending.acquire(blocking=False):
            threading.Event().wait()  # the process is being ended with another message
        # on a thread, because the store may not answer
        report = threading.Thread(target=self._report, args=(text,), daemon=True)
        report.start()
        report.join(self.interval)
        print(f"error: {text}" if shown is None else shown, file=sys.stderr)
        if self.process == 0:
            # the store ends with this process: let the others read it
            time.sleep(3 * self.interval)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def _report(self, text: str) -> None:
        try:
            self.store.key_value_set("wan/fault/first", text)
        # Broad, because JAX's client raises its own types. Another process was first, or the store
        # is gone: either way this process goes on to print its own reason.
        except Exception:
            return

    def _beat(self) -> None:
        """Write this process's heartbeats and read those of all."""
        while not self.closed.wait(self.interval):
            now = time.monotonic()
            self.number += 1
            try:
                self.store.key_value_set(
                    f"wan/beat/{self.process}",
                    json.dumps(
                        [self.number, self.host, self.current, self.count, now - self.begun]
                    ),
                    allow_overwrite=True,
                )
                beats = self.store.key_value_dir_get("wan/beat/")
                faults = self.store.key_value_dir_get("wan/fault/")
            # Broad, because JAX's client raises its own types, and this thread must survive a
            # store that is away for a moment: `_judge` sees for how long nothing was answered.
            except Exception:
                continue
            if faults and not self.closed.is_set():
                self.fail(faults[0][1])
            self.answered = time.monotonic()
            for key, value in beats:
                number, *known = json.loads(value)
                peer = self.peers[int(key.rsplit("/", 1)[1])]
                if number != peer.number:
                    peer.number, peer.at = number, self.answered
                    peer.host, peer.stage, peer.count, peer.seconds = known

    def _judge(self) -> None:
        """End this process when `verdict` finds something wrong."""
        last = time.monotonic()
        while not self.closed.wait(self.interval):
            now = time.monotonic()
            pause = now - last - self.interval
            last = now
            # This process was suspended itself: do not count that as silence of the others.
            if pause > self.timeout / 4:
                self.answered += pause
                for peer in self.peers.values():
                    peer.at += pause
            text = verdict(self.peers, self.answered, now, self.timeout, self.stage_timeout)
            if text and not self.closed.is_set():
                self.fail(text)

"""Notices that a process of a run on several hosts died or hangs, and ends the others with one
line.

Every process writes a beat into the coordinator's key-value store, with the stage that it is in,
and reads everybody's. A collective whose partner is gone waits for ever, so none of this happens on
the main thread.
"""

import dataclasses
import json
import os
import sys
import threading
import time
from typing import Protocol

AGAIN = "everything saved so far is whole: run the same command again, on fewer hosts too"


class Store(Protocol):
    """The part of JAX's distributed client that is used: strings by name, on the coordinator."""

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None: ...
    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]: ...


@dataclasses.dataclass
class Peer:
    """What is known of a process: its last beat, and when it came by the clock of this process."""

    number: int = -1  # of the beat
    at: float = 0.0
    host: str = "?"
    stage: str = "starting"
    count: int = 0  # stages begun: who has begun the fewest holds up the others
    seconds: float = 0.0  # in this stage


def verdict(
    peers: dict[int, Peer], answered: float, now: float, timeout: float, stage_timeout: float
) -> str | None:
    """What is wrong, in one line, or None.

    peers: of every process; answered: when the store did last; both by this process's clock, as
    `now`. Seconds; a stage_timeout of 0 never ends a stage.
    """
    if now - answered > timeout:
        return (
            f"process 0 on {peers[0].host}, the coordinator, has not answered for "
            f"{now - answered:.0f} s: it died, hangs, or the network is down; {AGAIN}"
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
            f"{AGAIN}"
        )
    slowest = min(peers, key=lambda p: (peers[p].count, p))
    if stage_timeout and all(peer.seconds > stage_timeout for peer in peers.values()):
        peer = peers[slowest]
        return (
            f"no process has got any further for {stage_timeout:.0f} s; process {slowest} on "
            f"{peer.host} is furthest behind, in '{peer.stage}'; {AGAIN}, with a longer "
            "--stage_timeout if nothing hung"
        )
    return None


class Watch:
    """Two threads: one exchanges beats, which may block for ever, the other judges what came."""

    def __init__(
        self,
        store: Store,
        process: int,
        processes: int,
        host: str,
        timeout: float,
        stage_timeout: float,
    ):
        self.store, self.process, self.timeout, self.stage_timeout = (
            store,
            process,
            timeout,
            stage_timeout,
        )
        self.interval = min(max(timeout / 20, 0.1), 2.0)
        now = time.monotonic()
        self.peers = {p: Peer(at=now) for p in range(processes)}
        self.answered, self.host, self.number = now, host, 0
        self.current, self.begun, self.count = "starting", now, 0
        self.ending, self.closed = threading.Lock(), threading.Event()
        for work in (self._beat, self._judge):
            threading.Thread(target=work, name=f"hosts{work.__name__}", daemon=True).start()

    def stage(self, name: str) -> None:
        self.current, self.begun, self.count = name, time.monotonic(), self.count + 1

    def close(self) -> None:
        self.closed.set()

    def lost(self) -> str | None:
        """For the main thread after an error of unknown cause: whether it is that another process
        is gone. A broken connection fails a collective at once, so a silence much shorter than the
        timeout tells.
        """
        silence = min(3 * self.interval, self.timeout)
        time.sleep(silence + 2 * self.interval)
        return verdict(self.peers, self.answered, time.monotonic(), silence, 0)

    def fail(self, text: str, code: int = 1, shown: str | None = None) -> None:
        """Tells the others why this process ends (`text`; it is ignored when another was first) and
        ends it, without waiting for any of them. shown: what is printed here, if not `text`.
        """
        if not self.ending.acquire(blocking=False):
            threading.Event().wait()  # the process is being ended with another message
        # the store may not answer
        told = threading.Thread(target=self._tell, args=(text,), daemon=True)
        told.start()
        told.join(self.interval)
        print(f"error: {text}" if shown is None else shown, file=sys.stderr)
        if self.process == 0:
            # the store ends with this process: let the others read it
            time.sleep(3 * self.interval)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def _tell(self, text: str) -> None:
        try:
            self.store.key_value_set("wan/fault/first", text)
        except Exception:  # someone was first, or there is nobody to tell
            return

    def _beat(self) -> None:
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
                beats, faults = (
                    self.store.key_value_dir_get("wan/beat/"),
                    self.store.key_value_dir_get("wan/fault/"),
                )
            except Exception:  # the judge sees that nothing is answered
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
        last = time.monotonic()
        while not self.closed.wait(self.interval):
            now = time.monotonic()
            pause = now - last - self.interval
            last = now
            # this process stood still itself: that is not the others' silence
            if pause > self.timeout / 4:
                self.answered += pause
                for peer in self.peers.values():
                    peer.at += pause
            text = verdict(self.peers, self.answered, now, self.timeout, self.stage_timeout)
            if text and not self.closed.is_set():
                self.fail(text)

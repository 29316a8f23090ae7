"""Attacks a reward server and its client, and counts what was handled as it should be.

    python -m benchmarks.server_attacks [--mutations=2000] [--seed=0]

Needs no accelerator and takes about a minute. A row per group: how many inputs or connections were
tried, and how many were answered rightly; what was not is printed. Rightly means for the server: a
status that the wire format names,
    within
seconds, and a good request is still scored. For the client: a score, or an error of the video
alone,
    within the timeout.
The servers' logs must hold no traceback. Exit code 1 where anything was not as it should be.
"""

import collections
import contextlib
import dataclasses
import functools
import logging
import os
import pathlib
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Iterator

import numpy as np
from absl import app, flags

from benchmarks.attack_inputs import (
    BODY,
    HEALTH,
    TOKEN,
    VIDEOS,
    bad_answers,
    head,
    http_answer,
    malformed_bodies,
    malformed_http,
    mutated_bodies,
    whole,
)
from rewards.base import RewardError
from rewards.remote.client import RemoteReward
from rewards.workers import RewardPool

MEASURE = ("--reward=rewards.quality:QualityReward", '--options={"name": "exposure"}')
REQUEST_SECONDS = 20.0  # for one answer, on a busy machine
MALFORMED = (400, 404, 405, 408, 413, 415, 422)


@dataclasses.dataclass
class Tally:
    """Counts of one group of attacks. wrong: what was tried, and what happened instead."""

    name: str
    tried: int = 0
    wrong: list[str] = dataclasses.field(default_factory=list)
    seen: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    def add(self, what: str, outcome: object, right: bool) -> None:
        self.tried += 1
        self.seen[str(outcome)] += 1
        if not right:
            self.wrong.append(f"{what}: {outcome}")

    def __str__(self) -> str:
        seen = ", ".join(f"{count} x {outcome}" for outcome, count in self.seen.most_common(8))
        return f"| {self.name} | {self.tried} | {self.tried - len(self.wrong)} | {seen} |"


# --- the server -----------------------------------------------------------------------------------

Address = tuple[str, int]


def ask(address: Address, data: bytes, leave: bool = False) -> int | str:
    """The status of the answer to `data`; "closed" where there is none, "hung" where nothing
    happens for long.
    """
    try:
        with socket.create_connection(address, timeout=REQUEST_SECONDS) as sock:
            # an answer may have come before the end
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                sock.sendall(data)
            if leave:
                return "left"
            with sock.makefile("rb") as file:
                status = file.readline(1000)
                while status.startswith(b"HTTP/1.1 100"):
                    while file.readline(1000).strip():
                        pass
                    status = file.readline(1000)
            return int(status.split()[1]) if status.startswith(b"HTTP/1.1 ") else "closed"
    except TimeoutError:
        return "hung"
    except ConnectionError:
        return "closed"


def attack_with_requests(address: Address, mutations: int, seed: int) -> list[Tally]:
    """Inputs with the token, and all of them without it. The server must have been made with
    `TOKEN`.
    """
    http, bodies = Tally("malformed HTTP"), Tally("malformed bodies")
    random_bodies, strangers = (
        Tally("bodies with random changes"),
        Tally("the same without the token"),
    )
    for name, data in malformed_http():
        status = ask(address, data)
        http.add(name, status, status in (*MALFORMED, 501))
    for tally, cases in (
        (bodies, malformed_bodies()),
        (random_bodies, mutated_bodies(mutations, seed)),
    ):
        for name, body in cases:
            status = ask(address, whole(body))
            tally.add(
                name, status, status in MALFORMED or (tally is random_bodies and status == 200)
            )
    for name, body in malformed_bodies():
        status = ask(address, whole(body, token="wrong"))
        strangers.add(name, status, status == 401)
    http.add("a good request afterwards", status := ask(address, whole(BODY)), status == 200)
    return [http, bodies, random_bodies, strangers]


def attack_by_leaving(address: Address, count: int = 30) -> Tally:
    """Clients that leave within the header, within the body and while they wait."""
    tally = Tally("clients that leave")
    for number in range(count):
        data = whole(BODY)
        cut = (number * 37) % (len(data) + 1)
        tally.add(f"after {cut} bytes", ask(address, data[:cut], leave=True), True)
    tally.add("a good request afterwards", status := ask(address, whole(BODY)), status == 200)
    return tally


def attack_with_connections(address: Address, seconds: float, count: int = 100) -> Tally:
    """Silent and half-sent connections; each must be closed within `seconds`, and clients answered
    meanwhile.
    """
    tally = Tally("connections without a request")
    starts = (
        b"",
        b"GET /v1/health HTTP/1.1\r\nHo",
        head(length=10**6, token="wrong"),
        head("Transfer-Encoding: chunked", token="wrong"),
    )
    with contextlib.ExitStack() as stack:
        socks = [
            stack.enter_context(socket.create_connection(address, timeout=seconds))
            for _ in range(count)
        ]
        for number, sock in enumerate(socks):
            with contextlib.suppress(ConnectionError):  # closed to make room
                sock.sendall(starts[number % len(starts)])
        for _ in range(20):
            status = ask(address, whole(BODY))
            tally.add("a client meanwhile", status, status == 200)
        deadline = time.monotonic() + seconds
        for number, sock in enumerate(socks):
            sock.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                while sock.recv(1 << 16):
                    pass
                outcome = "closed"
            except ConnectionError:
                outcome = "closed"
            except TimeoutError:
                outcome = f"open after {seconds:g} s"
            tally.add(f"{starts[number % len(starts)][:20]!r}", outcome, outcome == "closed")
    return tally


def attack_with_flood(address: Address, count: int = 50) -> Tally:
    """Connections opened as fast as one thread can, the last 1500 of them kept, while a client
    sends requests.
    """
    tally, stop, opened = Tally("requests during a flood of connections"), threading.Event(), 0

    def flood() -> None:
        nonlocal opened
        socks: collections.deque[socket.socket] = collections.deque()
        while not stop.is_set():
            with contextlib.suppress(OSError):
                socks.append(socket.create_connection(address, timeout=1.0))
                opened += 1
            if len(socks) > 1500:
                socks.popleft().close()
        for sock in socks:
            sock.close()

    thread = threading.Thread(target=flood)
    thread.start()
    for _ in range(count):
        status = ask(address, whole(BODY))
        tally.add("request", status, status == 200)
    stop.set()
    thread.join()
    tally.name += f" ({opened})"
    return tally


def attack_memory(address: Address, process: int, count: int = 12) -> Tally:
    """Bodies of 32 MiB less a byte, all but their last bytes: a server with --max_memory_mib=64
    takes two of them.
    """
    tally = Tally("12 uploads of 32 MiB, --max_memory_mib=64")
    size, before = (32 << 20) - 1, resident(process)
    with contextlib.ExitStack() as stack:
        socks = [
            stack.enter_context(socket.create_connection(address, timeout=REQUEST_SECONDS))
            for _ in range(count)
        ]
        for sock in socks:
            sock.sendall(head(length=size) + bytes(size - 1))
        time.sleep(1.0)
        grown = resident(process) - before
        statuses = []
        for sock in socks:
            sock.settimeout(0.5)
            try:
                statuses.append(int(sock.recv(100).split()[1]))
            except TimeoutError:
                statuses.append("taken")
    for status in statuses:
        tally.add("upload", status, status in (503, 408, "taken") and statuses.count("taken") <= 2)
    tally.add(
        "memory",
        "memory within 100 MiB" if grown < 100 << 20 else f"{grown >> 20} MiB",
        grown < 100 << 20,
    )
    return tally


def resident(process: int) -> int:
    """Bytes of memory that a process holds."""
    return int(pathlib.Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf(
        "SC_PAGE_SIZE"
    )


@contextlib.contextmanager
def serving(
    *options: str, files: int | None = None, port: int = 0
) -> Iterator[tuple[Address, subprocess.Popen, list[str]]]:
    """`python -m rewards.server` as a process: (address, process, lines of its log, complete at the
    end).
    """
    limit = ["sh", "-c", f'ulimit -n {files}; exec "$@"', "sh"] if files else []
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [
                *limit,
                sys.executable,
                "-m",
                "rewards.server",
                f"--port={port}",
                "--workers=1",
                *MEASURE,
                *options,
            ],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=os.environ | {"REWARD_TOKEN": TOKEN},
        )
        lines: list[str] = []
        try:
            url = urllib.parse.urlsplit(process.stdout.readline().split()[3])
            yield (url.hostname, url.port), process, lines
        finally:
            process.terminate()
            process.wait()
            process.stdout.close()
            log.seek(0)
            lines += log.read().splitlines()


def check_log(name: str, lines: list[str], most: int) -> Tally:
    """A log with no traceback, no token, and few lines."""
    tally = Tally(f"log of {name}")
    tracebacks = sum("Traceback" in line for line in lines)
    tally.add("tracebacks", f"{tracebacks} tracebacks", tracebacks == 0)
    tally.add("token", "no token", not any(TOKEN in line for line in lines))
    tally.add("lines", f"{len(lines)} lines", len(lines) <= most)
    return tally


# --- the client -----------------------------------------------------------------------------------


@contextlib.contextmanager
def answering(health: bytes, start: bytes = b"", repeated: bytes = b"") -> Iterator[str]:
    """A server that answers GET with `health`, and POST with `start` and then `repeated` for ever."""
    stop = threading.Event()

    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            with contextlib.suppress(OSError):
                while data := self.request.recv(1 << 16):
                    if data.startswith(b"GET"):
                        self.request.sendall(health)
                        continue
                    self.request.sendall(start)
                    while repeated and not stop.wait(0.05):
                        self.request.sendall(repeated)
                    return

    server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        stop.set()
        server.shutdown()
        server.server_close()
        thread.join()


def attack_client_with_answers(timeout: float = 0.3) -> Tally:
    """Each bad answer must mask its video, within the time of the pool's two attempts."""
    tally = Tally("bad answers to the client")
    for name, start, repeated in bad_answers():
        with answering(http_answer(HEALTH), start, repeated) as url:
            began = time.monotonic()
            reward = RemoteReward(
                [url], timeout=timeout, retries=0, patience=0.2, first_pause=0.05, bounds=(0.0, 1.0)
            )
            try:
                with RewardPool(lambda reward=reward: reward, 1, "thread") as pool:
                    scores = pool.submit(VIDEOS[:1], [["a"]]).result(timeout=REQUEST_SECONDS)
                outcome = (
                    "masked"
                    if (scores.failures, scores.valid.tolist()) == (1, [False])
                    else f"{scores.values}"
                )
            except Exception as error:  # whatever it is, it would have ended the training
                outcome = f"{type(error).__name__}: {error}"
            seconds = time.monotonic() - began
            slow = seconds > 2 * timeout + 3
            tally.add(
                name, f"{seconds:.1f} s" if slow else outcome, outcome == "masked" and not slow
            )
    return tally


def attack_client_at_the_start() -> Tally:
    """Health pages, URLs and tokens that cannot be used: one message, which does not repeat a
    secret.
    """
    tally = Tally("bad health pages, URLs and tokens")

    def connect(name: str, url: str, token: str = "") -> None:
        try:
            RemoteReward(
                [url], timeout=0.3, patience=0.2, token=token, expect={"name": "ocr"}
            ).close()
            outcome = "taken"
        except (RewardError, ValueError) as error:
            outcome = (
                "one message" if "hush" not in str(error) and len(str(error)) < 2000 else f"{error}"
            )
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}"
        tally.add(name, outcome, outcome == "one message")

    nested = b"[" * 600 + b"]" * 600
    for health in (
        None,
        5,
        [],
        {},
        "a",
        {"reward": 5},
        {"reward": {}},
        {"reward": {"name": "x" * 100_000}},
        {"reward": {"name": ["x"]}},
        HEALTH | {"workers": "x"},
        HEALTH | {"workers": None},
        HEALTH | {"workers": -1},
        HEALTH | {"workers": 0.5},
        b"",
        b"{",
        b"\xff",
        nested,
        b'{"reward": ' + nested + b"}",
        b"[" * 100_000,
    ):
        with answering(http_answer(health)) as url:
            connect(f"health {health!r:.40}", url)
    for status in (301, 401, 403, 404, 500):
        with answering(http_answer({"detail": "no"}, status)) as url:
            connect(f"health {status}", url, token="hush-hush")
    for url in (
        "",
        "cpu1",
        "cpu1:8080",
        "ftp://cpu1",
        "http://",
        "http://:80",
        "http://cpu1:port",
        "http://cpu1:99999",
        "http://cpu1/?a=b",
        "http://cpu1/#a",
        "http://user:hush@cpu1",
        "http://[::1",
        "http://a..b",
        f"http://{'a' * 70}",
        "http://127.0.0.1:9/a b",
        "http://127.0.0.1:9/\r\nA: b",
        "http://127.0.0.1:9",
        "file:///etc/passwd",
    ):
        connect(f"URL {url!r:.40}", url)
    for token in ("hush hush", "hush\r\nA: b", "hush\x00", "hüsh", "hush\x7f"):
        connect(f"token {token!r}", "http://127.0.0.1:9", token)
    return tally


def attack_with_outage() -> Tally:
    """A server killed while it scores, and started again: every video must be scored."""
    tally = Tally("a server killed in mid-batch and started again")
    videos = VIDEOS[np.arange(200) % 2]
    with serving() as (address, process, _):
        url = f"http://{address[0]}:{address[1]}"
        reward = RemoteReward([url], token=TOKEN, timeout=10.0, patience=60.0, first_pause=0.1)
        with RewardPool(lambda: reward, 4, "thread") as pool:
            pending = pool.submit(videos, ["a"] * len(videos))
            while not pending.futures[20].done():
                time.sleep(0.001)
            process.kill()
            process.wait()
            with serving(port=address[1]):
                for valid in pending.result(timeout=120).valid.tolist():
                    tally.add("video", "scored" if valid else "masked", valid)
    return tally


# --- the command ----------------------------------------------------------------------------------

MUTATIONS = flags.DEFINE_integer("mutations", 2000, "bodies with random changes", lower_bound=0)
SEED = flags.DEFINE_integer("seed", 0, "of the random changes")


def main(_) -> None:
    tallies: list[Tally] = []

    def report(*found: Tally) -> None:
        for tally in found:
            print(tally, flush=True)
        tallies.extend(found)

    logging.getLogger("rewards.remote").setLevel(logging.ERROR)  # it warns of every bad answer
    print("| what | tried | as it should be | seen |\n|---|---|---|---|")
    with serving("--max_mib=32", "--max_memory_mib=64", "--upload_timeout=5") as (
        address,
        process,
        lines,
    ):
        report(*attack_with_requests(address, MUTATIONS.value, SEED.value))
        report(attack_by_leaving(address), attack_memory(address, process.pid))
        report(attack_with_connections(address, seconds=15.0))
    report(check_log("that server", lines, most=200))
    with serving(files=64) as (address, _, lines):
        report(
            dataclasses.replace(
                attack_with_connections(address, 15.0, 300), name="the same, 300 with ulimit -n 64"
            )
        )
        report(attack_with_flood(address))
    report(check_log("that server", lines, most=3))
    report(attack_client_with_answers())
    report(attack_client_at_the_start())
    report(attack_with_outage())
    wrong = [f"{tally.name}: {what}" for tally in tallies for what in tally.wrong]
    seen = functools.reduce(lambda a, b: a + b, (tally.seen for tally in tallies))
    print(
        f"\n{sum(tally.tried for tally in tallies)} tried, {len(wrong)} not as they should be; "
        f"answers of 500: {seen['500']}, hung: {seen['hung']}"
    )
    print("\n".join(wrong))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    app.run(main)

"""Attacks a reward server and its client, and counts the attacks that were handled correctly.

    python -m benchmarks.server_attacks [--mutations=2000] [--seed=0]

Needs no accelerator and takes about a minute. Prints a row per group: number of inputs or
connections, number that were handled correctly, and the outcomes; then every wrong outcome. Correct
means for the server: a status of the wire format within seconds, and a good request is still
scored. For the client: a score, or an error of that video alone, within the time limit. The
servers' logs must have no traceback. Exit code 1 if any outcome was wrong.
"""

import collections
import contextlib
import dataclasses
import logging
import os
import pathlib
import socket
import sys
import threading
import time

from absl import app, flags

from benchmarks.attack_inputs import (
    BODY,
    TOKEN,
    head,
    malformed_bodies,
    malformed_http,
    mutated_bodies,
    whole,
)
from benchmarks.attack_support import REQUEST_SECONDS, Address, Tally, serving
from benchmarks.client_attacks import (
    attack_client_at_the_start,
    attack_client_with_answers,
    attack_with_outage,
)

MALFORMED = (400, 404, 405, 408, 413, 415, 422)


def ask(address: Address, data: bytes, leave: bool = False) -> int | str:
    """Send `data` and return the status of the answer; "closed" if there is none, "hung" after
    `REQUEST_SECONDS`. leave: close the connection without waiting, and return "left".
    """
    try:
        with socket.create_connection(address, timeout=REQUEST_SECONDS) as sock:
            # The server may answer before it has read everything.
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
    """Send malformed requests and bodies with the token, and the bodies again without it. The
    server's token must be `TOKEN`.
    """
    http, bodies = Tally("malformed HTTP"), Tally("malformed bodies")
    random_bodies = Tally("bodies with random changes")
    unauthorised = Tally("malformed bodies without the token")
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
        unauthorised.add(name, status, status == 401)
    http.add("a good request afterwards", status := ask(address, whole(BODY)), status == 200)
    return [http, bodies, random_bodies, unauthorised]


def attack_by_leaving(address: Address, count: int = 30) -> Tally:
    """Leave within the header, within the body and while the server scores."""
    tally = Tally("clients that leave")
    for number in range(count):
        data = whole(BODY)
        cut = (number * 37) % (len(data) + 1)
        tally.add(f"after {cut} bytes", ask(address, data[:cut], leave=True), True)
    tally.add("a good request afterwards", status := ask(address, whole(BODY)), status == 200)
    return tally


def attack_with_connections(address: Address, seconds: float, count: int = 100) -> Tally:
    """Open silent connections and send halves of requests. Each connection must be closed within
    `seconds`, and clients must get answers meanwhile.
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
    """Open connections as fast as one thread can and keep the last 1500 of them, while a client
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
    """Send bodies of 32 MiB without their last byte. A server with --max_memory_mib=64 must accept
    at most two of them. process: the server's id.
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
                statuses.append("accepted")
    for status in statuses:
        tally.add(
            "upload", status, status in (503, 408, "accepted") and statuses.count("accepted") <= 2
        )
    tally.add(
        "memory",
        "memory within 100 MiB" if grown < 100 << 20 else f"{grown >> 20} MiB",
        grown < 100 << 20,
    )
    return tally


def resident(process: int) -> int:
    """Return the bytes of memory that a process uses."""
    return int(pathlib.Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf(
        "SC_PAGE_SIZE"
    )


def check_log(name: str, lines: list[str], most: int) -> Tally:
    """Check that a log has no traceback, no token, and at most `most` lines."""
    tally = Tally(f"log of {name}")
    tracebacks = sum("Traceback" in line for line in lines)
    tally.add("tracebacks", f"{tracebacks} tracebacks", tracebacks == 0)
    tally.add("token", "no token", not any(TOKEN in line for line in lines))
    tally.add("lines", f"{len(lines)} lines", len(lines) <= most)
    return tally


# --- The command ----------------------------------------------------------------------------------

MUTATIONS = flags.DEFINE_integer("mutations", 2000, "bodies with random changes", lower_bound=0)
SEED = flags.DEFINE_integer("seed", 0, "of the random changes")


def main(_) -> None:
    tallies: list[Tally] = []

    def report(*group: Tally) -> None:
        for tally in group:
            print(tally, flush=True)
        tallies.extend(group)

    logging.getLogger("rewards.remote").setLevel(logging.ERROR)  # it warns of every bad answer
    print("| attack | number | correct | outcomes |\n|---|---|---|---|")
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
    wrong = [f"{tally.name}: {outcome}" for tally in tallies for outcome in tally.wrong]
    outcomes = sum((tally.outcomes for tally in tallies), collections.Counter())
    print(
        f"\n{sum(tally.tried for tally in tallies)} attacks, {len(wrong)} wrong outcomes; "
        f"answers of 500: {outcomes['500']}, hung: {outcomes['hung']}"
    )
    print("\n".join(wrong))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    app.run(main)

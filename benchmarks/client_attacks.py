"""Attacks on the client of reward servers, for `benchmarks.server_attacks`: bad answers, bad servers
at the start, and an outage.
"""

import contextlib
import http.client
import socketserver
import threading
import time
from collections.abc import Iterator

import numpy as np

from benchmarks.attack_inputs import HEALTH, TOKEN, VIDEOS, bad_answers, http_answer
from benchmarks.attack_support import REQUEST_SECONDS, Tally, serving
from rewards.base import RewardError
from rewards.pool import RewardPool
from rewards.remote.client import RemoteReward

# what a client cannot use at the start
BAD_HEALTH = (
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
    b"[" * 600 + b"]" * 600,
    b'{"reward": ' + b"[" * 600 + b"]" * 600 + b"}",
    b"[" * 100_000,
)
BAD_URLS = (
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
)
BAD_TOKENS = ("hush hush", "hush\r\nA: b", "hush\x00", "hüsh", "hush\x7f")


@contextlib.contextmanager
def answering(health: bytes, start: bytes = b"", repeated: bytes = b"") -> Iterator[str]:
    """Run a server that answers GET with `health`, and POST with `start` and then `repeated` again
    and again; gives its URL.
    """
    stop = threading.Event()

    class Handler(socketserver.StreamRequestHandler):
        def handle(self):
            with contextlib.suppress(OSError):
                while request := self.rfile.readline():
                    header = http.client.parse_headers(self.rfile)
                    # Read the whole request: else the client may fail before it sees the answer.
                    self.rfile.read(int(header.get("Content-Length", 0)))
                    if request.startswith(b"GET"):
                        self.wfile.write(health)
                        continue
                    self.wfile.write(start)
                    while repeated and not stop.wait(0.05):
                        self.wfile.write(repeated)
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
    """Send bad answers. Each must mask its video within the time of the pool's two attempts.

    timeout: seconds that the client waits for an answer.
    """
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
                masked = (scores.failures, scores.valid.tolist()) == (1, [False])
                outcome = "masked" if masked else f"{scores.values}"
            except Exception as error:  # any error would have ended the training
                outcome = f"{type(error).__name__}: {error}"
            seconds = time.monotonic() - began
            slow = seconds > 2 * timeout + 3
            tally.add(
                name, f"{seconds:.1f} s" if slow else outcome, outcome == "masked" and not slow
            )
    return tally


def attack_client_at_the_start() -> Tally:
    """Give the client health pages, URLs and tokens that it cannot use. Each must lead to one
    message, which repeats no secret.
    """
    tally = Tally("bad health pages, URLs and tokens")

    def connect(name: str, url: str, token: str = "") -> None:
        try:
            RemoteReward(
                [url], timeout=0.3, patience=0.2, token=token, expect={"name": "ocr"}
            ).close()
            outcome = "taken"
        except (RewardError, ValueError) as error:
            is_right = "hush" not in str(error) and len(str(error)) < 2000
            outcome = "one message" if is_right else f"{error}"
        except Exception as error:  # any other error is an outcome that is not right
            outcome = f"{type(error).__name__}: {error}"
        tally.add(name, outcome, outcome == "one message")

    for health in BAD_HEALTH:
        with answering(http_answer(health)) as url:
            connect(f"health {health!r:.40}", url)
    for status in (301, 401, 403, 404, 500):
        with answering(http_answer({"detail": "no"}, status)) as url:
            connect(f"health {status}", url, token="hush-hush")
    for url in BAD_URLS:
        connect(f"URL {url!r:.40}", url)
    for token in BAD_TOKENS:
        connect(f"token {token!r}", "http://127.0.0.1:9", token)
    return tally


def attack_with_outage() -> Tally:
    """Kill a server while it scores, and start it again. Every video must be scored."""
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

"""Servers on localhost for the tests: reward servers in this process or as a command, and servers
whose answers a test decides.
"""

import contextlib
import http.client
import http.server
import json
import os
import pathlib
import signal
import socketserver
import subprocess
import sys
import threading
import time
import urllib.parse

import numpy as np

from rewards.pool import RewardPool
from rewards.remote.wire import CONTENT_TYPE, encode_request
from tests.rewards import pool_rewards

TOKEN = "a-token-for-tests"
VIDEOS = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 5, 3), np.uint8)
BODY = b"".join(encode_request(VIDEOS, ["a", "b"]))
ROOT = pathlib.Path(__file__).parent.parent.parent


@contextlib.contextmanager
def serving(
    reward=pool_rewards.Brightness,
    workers=2,
    token=TOKEN,
    about=None,
    port=0,
    admission=None,
    **options,
):
    """Run a reward server on a thread of this process; gives its URL. options: of `make_app`."""
    from rewards.remote.admission import Admission
    from rewards.remote.application import make_app, make_server
    from rewards.server import bind

    with RewardPool(reward, workers, "thread") as pool:
        sock = bind("127.0.0.1", port)
        sock.listen()
        api = make_app(pool, about or {"name": "brightness"}, token, **options)
        server = make_server(api, admission or Admission(100))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{sock.getsockname()[1]}"
        finally:
            server.should_exit = server.force_exit = True
            thread.join()


class Command:
    """`python -m rewards.server` as a process. files: limit of its open files, None for that of this
    process.
    """

    def __init__(self, *flags, port=0, files=None):
        self.process = subprocess.Popen(
            [
                *(["sh", "-c", f'ulimit -n {files}; exec "$@"', "sh"] if files else []),
                sys.executable,
                "-m",
                "rewards.server",
                f"--port={port}",
                *flags,
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT), "REWARD_TOKEN": TOKEN},
        )

    def url(self):
        """Wait until the server answers; return its URL."""
        line = self.process.stdout.readline()
        assert line.startswith("reward server on http://"), line + self.process.stderr.read()
        return line.split()[3]

    def kill(self, number=signal.SIGKILL):
        """Send a signal; return the exit code."""
        self.process.send_signal(number)
        return self.process.wait(timeout=30)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        self.process.stderr.close()


@contextlib.contextmanager
def scripted(answer):
    """Run a server that answers with `answer(method, path, headers, body)`; gives its URL. The result
    is (status, bytes or an object for JSON), and perhaps seconds to wait before the answer.
    """

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, content, *seconds = answer(self.command, self.path, self.headers, body)
            time.sleep(sum(seconds))
            content = content if isinstance(content, bytes) else json.dumps(content).encode()
            with contextlib.suppress(OSError):
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        do_POST = do_GET

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextlib.contextmanager
def trickling(start, repeated=b"", pause=0.05):
    """Run a server that answers each connection with `start`, whatever the request, and then with
    `repeated` again and again, or else closes the connection; gives its URL.
    """
    stop = threading.Event()

    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            with contextlib.suppress(OSError):
                self.request.recv(1 << 16)
                self.request.sendall(start)
                while repeated and not stop.wait(pause):
                    self.request.sendall(repeated)

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


def wait_for(condition, seconds=10):
    """Wait until `condition()` is true, at most `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def ask(url, method="POST", path="/v1/score", body=BODY, token=TOKEN, **headers):
    """(status, JSON, headers) of one request to a reward server. headers: with _ for -."""
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(url).netloc, timeout=30)
    headers = {"Content-Type": CONTENT_TYPE, "Authorization": f"Bearer {token}"} | {
        name.replace("_", "-"): value for name, value in headers.items()
    }
    connection.request(method, path, body if method == "POST" else None, headers)
    response = connection.getresponse()
    content = json.loads(response.read())
    connection.close()
    return response.status, content, response.headers

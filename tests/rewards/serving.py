"""Servers on localhost for the tests: reward servers in this process or in one of their own, and
scripted ones.
"""

import contextlib
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

from rewards.workers import RewardPool
from tests.rewards import pool_rewards

TOKEN = "a-token-for-tests"
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
    """A reward server on a thread of this process; gives its URL. options: of `make_app`."""
    from rewards.remote.admission import Admission
    from rewards.server import bind, make_app, make_server

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
    """`python -m rewards.server` as a process of its own. files: most that it may open, None for as
    many as here.
    """

    def __init__(self, *flags, port=0, files=None):
        path = os.pathsep.join([str(ROOT), str(pathlib.Path(__file__).parent)])
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
            env=os.environ | {"PYTHONPATH": path, "REWARD_TOKEN": TOKEN},
        )

    def url(self):
        """Waits until the server is there."""
        line = self.process.stdout.readline()
        assert line.startswith("reward server on http://"), line + self.process.stderr.read()
        return line.split()[3]

    def kill(self, number=signal.SIGKILL):
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
    """A server that answers as `answer(method, path, headers, body) -> (status, object for JSON or
    bytes)` says, after the seconds that a third item asks for.
    """

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, found, *seconds = answer(self.command, self.path, self.headers, body)
            time.sleep(sum(seconds))
            found = found if isinstance(found, bytes) else json.dumps(found).encode()
            with contextlib.suppress(OSError):
                self.send_response(status)
                self.send_header("Content-Length", str(len(found)))
                self.end_headers()
                self.wfile.write(found)

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
    """A server that answers each connection with `start`, whatever it is asked, then with
    `repeated` again and again; without, it closes the connection.
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

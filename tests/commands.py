"""Commands as users run them, in processes of their own."""

import atexit
import functools
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import tempfile

DEVICES = re.compile(r"--xla_force_host_platform_device_count=\d+")
ROOT = pathlib.Path(__file__).parent.parent
SERVER = hasattr(os, "pidfd_open")  # Linux


def environment(*without: str, devices: int = 0, **changes: str) -> dict[str, str]:
    """This process's, without PyTorch, which the tests alone need; compiling is as quick as here
    (`tests/conftest.py`).

    without: names of other variables that are left out; devices: simulated ones, 0: the CPU as it
    is; changes: values of other variables.
    """
    hidden = str(pathlib.Path(__file__).parent / "without_torch")
    kept = {k: v for k, v in os.environ.items() if k not in without}
    quick = DEVICES.sub(
        f"--xla_force_host_platform_device_count={devices}" if devices else "", kept["XLA_FLAGS"]
    )
    path = os.pathsep.join(filter(None, (hidden, os.environ.get("PYTHONPATH"))))
    return kept | {"XLA_FLAGS": quick, "PYTHONPATH": path} | changes


def command(module: str, *arguments) -> list[str]:
    """Runs like `python -m module arguments`, without the seconds in which it would import JAX.

    For an environment of `environment()`. All these commands share one seed of Python's hashes, and
    Ctrl-C meets none of them while it imports; where that matters, use `fresh`.
    """
    if not SERVER:
        return fresh(module, *arguments)
    return [
        sys.executable,
        "-S",
        str(ROOT / "tests/command_server.py"),
        _server(),
        module,
        *map(str, arguments),
    ]


def fresh(module: str, *arguments) -> list[str]:
    """`python -m module arguments`."""
    return [sys.executable, "-m", module, *map(str, arguments)]


def process_id(process: subprocess.Popen) -> int:
    """That of the command itself, for signals that Python cannot forward."""
    path = pathlib.Path(f"{_server()}.{process.pid}") if SERVER else None
    return int(path.read_text()) if path and path.exists() else process.pid


@functools.cache
def _server() -> str:
    """Starts this process's command server; its address."""
    folder = tempfile.mkdtemp(prefix="commands-")
    address = f"{folder}/socket"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(64)
        server = subprocess.Popen(
            [sys.executable, "-m", "tests.command_server", str(listener.fileno())],
            cwd=ROOT,
            env=environment(OPENBLAS_NUM_THREADS="1"),  # without threads, a fork copies only one
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=[listener.fileno()],
            start_new_session=True,
        )

    def end():
        server.stdin.close()
        server.wait()
        shutil.rmtree(folder, ignore_errors=True)

    atexit.register(end)
    return address

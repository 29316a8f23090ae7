"""Commands in processes that need not import JAX and the rest again: a server imports them once and
forks.

    python -m tests.command_server DESCRIPTOR        the server, on a socket; it ends with its standard input
    python -S tests/command_server.py ADDRESS MODULE [ARGUMENT ...]       `python -m MODULE ARGUMENT ...` by that server

The second form passes its environment, folder and standard streams on, forwards SIGINT and SIGTERM,
and ends as the command ends. When it is killed, so is the command. The command's own process id is
written to ADDRESS.PID, where PID is that of the second form.
"""

import contextlib
import json
import os
import signal
import socket
import sys

MODULES = (
    "grpo.train",
    "grpo.evaluate",
    "grpo.compare",
    "grpo.plan",
    "wan_jax.sample",
    "convert.from_diffusers",
    "convert.to_diffusers",
    "convert.export_lora",
)
# what the commands import late
LATE = ("rapidocr.main", "matplotlib.pyplot", "tensorboardX", "PIL.Image", "imageio")
FORWARDED = (signal.SIGINT, signal.SIGTERM)


def ask(address, module, arguments):
    """Has the server run the command; returns its exit code, negative for a signal."""
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
        command = json.dumps(
            {"module": module, "arguments": arguments, "env": dict(os.environ), "cwd": os.getcwd()}
        )
        socket.send_fds(server, [len(command).to_bytes(4, "big")], [0, 1, 2])
        server.sendall(command.encode())
        pid = number_from(server)
        with open(f"{address}.{os.getpid()}", "w") as file:
            file.write(str(pid))
        for number in FORWARDED:
            signal.signal(number, lambda number, _: os.kill(pid, number))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
        return os.waitstatus_to_exitcode(number_from(server))


def number_from(connection):
    received = connection.recv(4, socket.MSG_WAITALL)
    if len(received) < 4:
        raise EOFError("the other side has ended")
    return int.from_bytes(received, "big")


def serve(listener):
    """Forks a process for each command. Returns in those processes only: the command."""
    import selectors

    # (process id, its descriptor, connection), by the descriptor and by the connection
    running = {}
    with listener, selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        selector.register(0, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is listener:
                    connection, _ = listener.accept()
                    size, streams, *_ = socket.recv_fds(connection, 4, 3)
                    command = json.loads(
                        connection.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL)
                    )
                    if (pid := os.fork()) == 0:
                        for number, stream in enumerate(streams):
                            os.dup2(stream, number)
                            os.close(stream)
                        for _, descriptor, other in set(running.values()):
                            os.close(descriptor)
                            other.close()
                        connection.close()
                        return command
                    for stream in streams:
                        os.close(stream)
                    connection.sendall(pid.to_bytes(4, "big"))
                    process = pid, os.pidfd_open(pid), connection
                    for end in process[1:]:
                        running[end] = process
                        selector.register(end, selectors.EVENT_READ)
                elif key.fileobj == 0:  # the process that started the server has ended
                    for pid, *_ in running.values():
                        os.kill(pid, signal.SIGKILL)
                    os._exit(0)
                elif key.fileobj in running:
                    pid, descriptor, connection = running[key.fileobj]
                    if key.fileobj is connection:  # the asking process was killed
                        os.kill(pid, signal.SIGKILL)
                    status = os.waitpid(pid, 0)[1]
                    for end in (descriptor, connection):
                        selector.unregister(end)
                        del running[end]
                    os.close(descriptor)
                    with connection, contextlib.suppress(OSError):
                        connection.sendall(status.to_bytes(4, "big"))


def load():
    """Imports what the commands import, but for the commands themselves: these define flags."""
    import ast
    import gc
    import importlib.util
    import pathlib

    for name in MODULES:
        tree = ast.parse(pathlib.Path(importlib.util.find_spec(name).origin).read_text())
        imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        exec(compile(ast.Module(imports, []), name, "exec"), {})
    for name in LATE:
        importlib.import_module(name)
    if len(threads := os.listdir("/proc/self/task")) > 1:
        raise RuntimeError(
            f"{len(threads)} threads after the imports, whose locks a fork would leave taken"
        )
    gc.collect()
    gc.freeze()


def run(command):
    """As `python -m` runs it."""
    import runpy

    import jax

    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(command["env"])
    for name, value in command["env"].items():  # JAX reads its settings when it is imported
        setting = name.lower()
        if before.get(name) != value and setting in jax.config.values:
            known = jax.config.values[setting]
            jax.config.update(setting, value if known is None else type(known)(value))
    os.chdir(command["cwd"])
    sys.path[0] = command["cwd"]
    sys.argv[1:] = command["arguments"]
    runpy.run_module(command["module"], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        code = ask(sys.argv[1], sys.argv[2], sys.argv[3:])
        if code < 0:
            if -code != signal.SIGKILL:  # which has no handler
                signal.signal(-code, signal.SIG_DFL)
            os.kill(os.getpid(), -code)
        sys.exit(code)
    load()
    run(serve(socket.socket(fileno=int(sys.argv[1]))))

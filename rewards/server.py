"""Serves a reward over HTTP: `python -m rewards.server --host=0.0.0.0 --port=8080 --workers=16`.

This module is the command: its flags and their checks. The application is in
`rewards.remote.application`, the client in `rewards.remote.client`; docs/howto/rewards_server.md documents
both and the wire format. Needs `pip install -e '.[server]'`.
"""

import contextlib
import functools
import importlib
import inspect
import ipaddress
import json
import os
import pathlib
import socket
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags

from rewards.base import RewardError, import_problem, last_line
from rewards.ocr.engines import ENGINES
from rewards.ocr.rules import RULES, OCRReward
from rewards.ocr.two_readers import TwoReaderReward
from rewards.own import OwnReward
from rewards.pool import RewardPool
from rewards.remote.wire import MAX_MEMORY, MAX_QUEUE, UPLOAD_TIMEOUT, Limits

INTERRUPTED = 130  # exit code after Ctrl-C

HOST = flags.DEFINE_string(
    "host", "127.0.0.1", "address to listen on; 0.0.0.0 for all, which needs a token"
)
PORT = flags.DEFINE_integer(
    "port", 8080, "port; 0 chooses a free one and prints it", lower_bound=0, upper_bound=65535
)
TOKEN_FILE = flags.DEFINE_string("token_file", None, "file with the token that clients must send")
TOKEN_ENV = flags.DEFINE_string(
    "token_env", "REWARD_TOKEN", "environment variable with the token; used without --token_file"
)
ALLOW_ALL = flags.DEFINE_bool("allow_all", False, "serve other machines without a token")
WORKERS = flags.DEFINE_integer(
    "workers",
    max(1, (os.cpu_count() or 2) - 1),
    "scoring processes",
    lower_bound=1,
    upper_bound=1024,
)
REWARD = flags.DEFINE_string("reward", "ocr", "ocr, or your own as module:factory")
NAME = flags.DEFINE_string(
    "name", None, "name of your own reward, by which config.reward.servers refers to it"
)
BATCH = flags.DEFINE_integer(
    "batch",
    1,
    "largest number of waiting videos that a process scores together, by score_batch of your own reward",
    lower_bound=1,
)
OPTIONS = flags.DEFINE_string(
    "options", "{}", "JSON object with the keyword arguments of your own reward"
)
RULE = flags.DEFINE_enum(
    "rule", "spelling", tuple(RULES), "rule of reward ocr, as config.reward.rule"
)
ENGINE = flags.DEFINE_enum(
    "engine", "rapidocr", tuple(ENGINES), "engine of reward ocr, as config.reward.engine"
)
READER_TWO = flags.DEFINE_enum(
    "reader_two",
    "",
    ("", *ENGINES),
    "second engine of reward ocr, as config.reward.reader_two",
)
MAX_FRAMES = flags.DEFINE_integer(
    "max_frames", 9, "frames that reward ocr reads, as config.reward.max_frames", lower_bound=2
)
TIMEOUT = flags.DEFINE_float(
    "timeout", 120.0, "seconds for one video, after which its process is replaced", lower_bound=0.01
)
MAX_MIB = flags.DEFINE_integer("max_mib", 512, "largest request, MiB", lower_bound=1)
MAX_QUEUE_VIDEOS = flags.DEFINE_integer(
    "max_queue", MAX_QUEUE, "largest number of videos that may wait", lower_bound=1
)
MAX_MEMORY_MIB = flags.DEFINE_integer(
    "max_memory_mib",
    MAX_MEMORY >> 20,
    "largest memory of all requests together, MiB",
    lower_bound=1,
)
UPLOAD_SECONDS = flags.DEFINE_float(
    "upload_timeout", UPLOAD_TIMEOUT, "seconds for a request's body to arrive", lower_bound=0.01
)
GRACE = flags.DEFINE_integer(
    "grace",
    60,
    "seconds in which requests under way may finish when the server is stopped",
    lower_bound=0,
)


class UsageError(Exception):
    """An error that the user can correct. The command prints its message in one line."""


def check_used(name: str) -> None:
    """Raise `UsageError` where a flag is given that the reward `name` does not read."""
    of_ocr = (RULE, ENGINE, READER_TWO, MAX_FRAMES)
    fix = "your own reward gets its arguments by --options"
    if name == "ocr":
        fix = f"reward ocr reads {', '.join(f'--{flag.name}' for flag in of_ocr)}"
    for flag in (OPTIONS,) if name == "ocr" else of_ocr:
        if flag.present:
            raise UsageError(
                f"--{flag.name}={flag.value} has no effect with --reward={name}: leave it out; {fix}"
            )


def make_factory(name: str, options: dict[str, Any]) -> tuple[Callable[[], Any], dict[str, Any]]:
    """Return (picklable factory of the reward `name`, settings that the health page shows). Raises
    `UsageError`.
    """
    if name == "ocr":
        reward = TwoReaderReward if "reader_two" in options else OCRReward
        return functools.partial(reward, **options), {"name": "ocr", **options}
    module, _, attribute = name.partition(":")
    try:
        factory = getattr(importlib.import_module(module), attribute)
        inspect.signature(factory).bind(**options)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UsageError(
            f"--reward={name} with --options={json.dumps(options)} cannot be built ({error}): give "
            "'ocr', or module:factory that is on PYTHONPATH, and its keyword arguments"
        ) from None
    return functools.partial(factory, **options), {"name": name, **options}


def read_token(token_file: str | None, token_env: str, host: str, allow_all: bool) -> str:
    """Return the token, "" for none. Raises `UsageError` if it cannot be read, or if there is none
    and other machines could connect.
    """
    token = os.environ.get(token_env, "").strip()
    if token_file is not None:
        try:
            token = pathlib.Path(token_file).read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--token_file={token_file} cannot be read: {error}") from None
        if not token:
            raise UsageError(f"--token_file={token_file} is empty: write the token into it")
    if not token.isascii() or any(char.isspace() for char in token):
        raise UsageError(
            "the token has characters that no HTTP header can have: use ASCII letters and digits"
        )
    if not token and not allow_all and not _is_loopback(host):
        raise UsageError(
            f"--host={host} serves other machines, but there is no token: put one into "
            f"--token_file or the environment variable {token_env}, or give --allow_all"
        )
    return token


def _is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to the address. Raises `UsageError` if that is not possible."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        raise UsageError(
            f"--host={host} --port={port} cannot be listened on ({error}): choose another --port"
        ) from None
    return sock


def main(_: Sequence[str]) -> None:
    """Check the flags, build the reward, and serve it until the process is stopped."""
    try:
        from rewards.remote import admission, application
    except ImportError as error:
        fix = "pip install 'wan-jax-grpo[server]', or fastapi and uvicorn"
        raise UsageError(import_problem("the reward server", error, fix)) from None

    # 1. The flags.
    name = REWARD.value
    options = {"rule": RULE.value, "engine": ENGINE.value, "max_frames": MAX_FRAMES.value}
    if READER_TWO.value:
        options["reader_two"] = READER_TWO.value
    if name != "ocr":
        try:
            options = json.loads(OPTIONS.value)
        except ValueError as error:
            raise UsageError(f"--options={OPTIONS.value} is not JSON: {error}") from None
        if not isinstance(options, dict):
            raise UsageError(
                f'--options={OPTIONS.value} is not a JSON object: write {{"name": value, ...}}'
            )
    check_used(name)
    if name == "ocr" and (NAME.value not in (None, "ocr") or BATCH.value > 1):
        raise UsageError(
            f"--name={NAME.value} and --batch={BATCH.value} are of your own reward: give it as "
            "--reward=module:factory, or leave them out"
        )
    if MAX_MEMORY_MIB.value < MAX_MIB.value:
        raise UsageError(
            f"--max_memory_mib={MAX_MEMORY_MIB.value} is less than --max_mib={MAX_MIB.value}: "
            "allow at least one request"
        )
    token = read_token(TOKEN_FILE.value, TOKEN_ENV.value, HOST.value, ALLOW_ALL.value)
    factory, about = make_factory(name, options)
    if name != "ocr":
        factory = functools.partial(OwnReward.of, NAME.value or name, factory)
        about["name"] = NAME.value or name

    # 2. The address, before seconds are spent on building the reward.
    sock = bind(HOST.value, PORT.value)
    try:
        connections, accepted = admission.connection_limits(WORKERS.value)
    except ValueError as error:
        raise UsageError(str(error)) from None

    # 3. The reward.
    try:
        pool = RewardPool(factory, WORKERS.value, timeout=TIMEOUT.value, batch=BATCH.value)
    except RewardError as error:
        raise UsageError(f"the reward cannot be built: {last_line(str(error))}") from None
    if BATCH.value > 1 and not pool.traits.batched:
        pool.close()
        raise UsageError(
            f"--batch={BATCH.value} needs a reward with score_batch(videos, requests), which "
            f"--reward={name} does not have: write it, or leave out --batch"
        )

    # 4. Serving.
    with pool:
        sock.listen(application.BACKLOG)  # from here on a client that connects gets an answer
        print(
            f"reward server on http://{HOST.value}:{sock.getsockname()[1]} with {WORKERS.value} "
            f"workers: {json.dumps(about)}{'' if token else ', no token'}",
            flush=True,
        )
        api = application.make_app(
            pool,
            about,
            token,
            Limits(body=MAX_MIB.value << 20),
            max_queue=MAX_QUEUE_VIDEOS.value,
            max_memory=MAX_MEMORY_MIB.value << 20,
            upload_timeout=UPLOAD_SECONDS.value,
        )
        server = application.make_server(
            api, admission.Admission(connections), accepted, GRACE.value
        )
        application.serve(server, sock)


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Parse the flags. Raises `UsageError` for an unknown flag, a wrong value or any other
    argument.
    """
    try:
        arguments = flags.FLAGS(argv)
    except flags.Error as error:
        raise UsageError(f"{error}; see --help") from None
    except SystemExit:  # absl has printed the help, and would exit with 1
        sys.exit(0)
    if len(arguments) > 1:
        raise UsageError(
            f"unexpected argument {arguments[1]!r}; settings are given as --name=value, see --help"
        )
    return arguments


def run() -> None:
    """Run the command. Exit codes: 0 after a stop by SIGTERM or Ctrl-C while it serves, 1 for
    errors, 130 for Ctrl-C before it serves.
    """
    try:
        app.run(main, flags_parser=parse_flags)
    except UsageError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\nstopped before the server was ready", file=sys.stderr, flush=True)
        os._exit(INTERRUPTED)  # at once: do not wait for workers that are starting


if __name__ == "__main__":
    from wan_jax.command_line import early  # --help as that of all commands; it imports no JAX

    early.answer("rewards.server", sys.argv[1:])
    run()

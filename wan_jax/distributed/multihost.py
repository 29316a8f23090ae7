"""Several processes, on one host or many, that run the same program (`jax.distributed`).

Every process sees all devices and calls the same jitted functions in the same order. Host code
works on the rows of a batch that are on the process's own devices, and `gather` collects the
results. With one process, every function of this module is the identity.

The collectives are those of `jax.experimental.multihost_utils`; `gather` and `from_first` add what
it lacks: any picklable value, of a different size on each process, without a change of its bits.
"""

import contextlib
import os
import pickle
import signal
import socket
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from wan_jax.command_line import cli
from wan_jax.distributed import native_output
from wan_jax.distributed.launchers import Launch
from wan_jax.distributed.watchdog import RUN_AGAIN, Watch
from wan_jax.errors import UserError

CHUNK = 2**22  # bytes of one collective
FOLDER_SECONDS = 10  # in which a file of process 0 must become visible to the others
SHARED = "see docs/howto/hosts.md, What must be shared"
_watch: Watch | None = None


@contextlib.contextmanager
def joined(
    launch: Launch | None,
    timeout: float = 100,
    stage_timeout: float = 7200,
    join_timeout: float = 300,
) -> Iterator[None]:
    """Connect to the other processes for the duration of the program, and end this process when it
    or another one fails. Must be entered before JAX is used.

    Args:
        launch: how to find the others; None for a single process, which changes nothing.
        timeout: seconds after which a silent process ends the run on all others.
        stage_timeout: seconds in which some process must begin a new `stage`; 0 for no limit.
        join_timeout: seconds to wait for all processes at the start.

    Raises `UserError` when JAX cannot connect. Later errors are printed as `cli.run` prints them,
    and the process exits here without waiting for the others.
    """
    global _watch
    if launch is None:
        yield
        return
    for name, value in (("--host_timeout", timeout), ("--join_timeout", join_timeout)):
        if value < 1:
            raise UserError(f"{name}={value}: must be 1 second or more")
    if stage_timeout < 0:
        raise UserError(
            f"--stage_timeout={stage_timeout}: must be 0, for no limit, or more seconds"
        )
    # Connect, and watch the other processes from now on.
    _join(launch, timeout, join_timeout)
    process = jax.process_index()
    name = f"process {process} on {socket.gethostname()}"
    from jax._src import distributed  # the key-value store has no public name

    store = distributed.global_state.client
    assert store is not None  # `_join` set it
    _watch = Watch(
        store,
        process,
        jax.process_count(),
        timeout=timeout,
        stage_timeout=stage_timeout,
    )
    native_output.set_message(
        f"error: {name} lost process 0, the coordinator: it died, hangs, or the network is down; "
        f"{RUN_AGAIN}"
    )
    # Run the program.
    try:
        yield
        stage("waiting for all processes to finish")
        gather(None)
    # Broad, because the others wait in a collective whatever ends this process: they must be told
    # the reason, and this one must not wait for them.
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        known = cli.explain(error)
        if known is None:
            if lost := _watch.lost():
                _watch.fail(lost)
            traceback.print_exc()
        text, code = known or (f"error: {name} failed: {type(error).__name__}", 1)
        _watch.fail(
            f"{name} ended the run: {' '.join(text.removeprefix('error: ').split())}",
            code,
            shown=text,
        )
    _watch.close()
    _watch = None
    jax.distributed.shutdown()


def _join(launch: Launch, timeout: float, join_timeout: float) -> None:
    """Initialise `jax.distributed`; seconds as in `joined`. Raises `UserError` when that fails."""
    native_output.divert()
    where = (
        f"process {launch.process} of {launch.processes}, with process 0 at {launch.coordinator},"
        if launch.cluster is None
        else f"a process of {launch.cluster}"
    )
    problem = f"{where} did not find all the others within {join_timeout:.0f} s"
    native_output.set_message(
        f"error: {problem}: is each started once, with its own number, the same count, and can it "
        "reach the coordinator?"
    )
    jax.config.update("jax_enable_preemption_service", False)  # it would swallow SIGTERM
    # Ctrl-C: Python's own handler would only run once the connection is made
    interrupt_handler = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        jax.distributed.initialize(
            launch.coordinator,
            launch.processes,
            launch.process,
            local_device_ids=[]
            if launch.all_devices and "JAX_LOCAL_DEVICE_IDS" not in os.environ
            else None,
            cluster_detection_method=launch.cluster or "deactivate",
            initialization_timeout=int(join_timeout),
            # longer than the watch needs, which reports what happened
            heartbeat_timeout_seconds=int(3 * timeout + 10),
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"{problem}: {' '.join(str(error).split())[:300]}") from error
    finally:
        signal.signal(signal.SIGINT, interrupt_handler)


def first() -> bool:
    """Return whether this process is the one that writes and prints for all."""
    return jax.process_index() == 0


def stage(name: str) -> None:
    """Record the name of the stage that begins now, for the message if this process hangs in it.
    Raises KeyboardInterrupt if Ctrl-C was pressed before.
    """
    cli.stop_if_interrupted()
    if _watch:
        _watch.stage(name)


def gather(value: Any) -> list:
    """Return the values of all processes, in their order, on every process. All must call this.

    The pickled value is sent as bytes, so it arrives unchanged. Raises ValueError when that is 4
    GiB or more.
    """
    if jax.process_count() == 1:
        return [value]
    data = pickle.dumps(value)
    if len(data) >= 2**32:
        raise ValueError(f"{len(data)} bytes are more than can be gathered at once, 4 GiB")
    sizes = multihost_utils.process_allgather(np.uint32(len(data)))
    # each [processes, bytes]
    pieces = [multihost_utils.process_allgather(piece) for piece in _pieces(data, int(sizes.max()))]
    return [
        pickle.loads(b"".join(piece[process].tobytes() for piece in pieces)[:size])
        for process, size in enumerate(sizes)
    ]


def from_first(make: Callable[[], Any]) -> Any:
    """Return make() of process 0 on every process; the others do not call it. All processes must
    call this; the value arrives unchanged, as with `gather`.
    """
    if jax.process_count() == 1:
        return make()
    value = make() if first() else None
    data = pickle.dumps(value) if first() else b""
    high, low = multihost_utils.broadcast_one_to_all(np.array(divmod(len(data), 2**31), np.int32))
    size = int(high) * 2**31 + int(low)
    received = bytearray(0 if first() else size)
    begin = 0
    for piece in _pieces(data, size):
        sent = multihost_utils.broadcast_one_to_all(piece)
        end = min(begin + len(piece), size)
        if not first():
            received[begin:end] = sent[: end - begin].data
        begin = end
    return value if first() else pickle.loads(received)


def _pieces(data: bytes, size: int) -> Iterator[np.ndarray]:
    """Yield `data`, padded with zeros to `size` bytes, in uint8 arrays. Their common length is a
    power of two up to `CHUNK`, so that few shapes are compiled.
    """
    width = min(CHUNK, max(1024, 1 << max(size - 1, 0).bit_length()))
    for start in range(0, size, width):
        yield np.frombuffer(data[start : start + width].ljust(width, b"\0"), np.uint8)


def my_rows(sharding: jax.sharding.Sharding, count: int) -> np.ndarray:
    """Return the rows of a batch of `count`, sharded along its only axis, that belong to this
    process: int [n], ascending.

    A row with copies on several devices belongs to the process of the first of these, so that every
    row belongs to exactly one process.
    """
    owner = {}
    for device, index in sharding.devices_indices_map((count,)).items():
        owner.setdefault(index[0].indices(count)[:2], device.process_index)
    spans = [
        np.arange(*span)
        for span, process in sorted(owner.items())
        if process == jax.process_index()
    ]
    return np.concatenate([np.arange(0), *spans])


def my_part(x: jax.Array) -> np.ndarray:
    """Return the rows of x [B, ...] that belong to this process (`my_rows`), on the host: [n, ...].

    n is 0 if all rows on its devices belong to other processes. Raises ValueError when another axis
    is sharded too.
    """
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
        return np.asarray(x)
    if x.sharding.shard_shape(x.shape)[1:] != x.shape[1:]:
        raise ValueError(
            f"an array {x.shape} is sharded as {x.sharding}; only its first axis may be"
        )
    shards = {
        shard.index[0].start or 0: shard.data
        for shard in x.addressable_shards
        if shard.replica_id == 0
    }
    rows = [np.asarray(shards[start]) for start in sorted(shards)]
    return np.concatenate([np.zeros((0, *x.shape[1:]), x.dtype), *rows])


def check_same_folder(setting: str, path: str, read: Callable[[], str | None]) -> None:
    """Check that `path` leads every process to the same folder as process 0. All must call this.

    Args:
        setting: flag or setting with the path, for the message.
        path: the folder, as this process has it.
        read: returns the content of a file that identifies the folder, None if it is missing. The
            others retry for `FOLDER_SECONDS`, because network file systems show a new file late.

    Raises `UserError`, the same on every process.
    """
    wanted = from_first(read)
    deadline = time.monotonic() + FOLDER_SECONDS
    while not (same := read() == wanted) and time.monotonic() < deadline:
        time.sleep(0.2)
    gathered = gather((socket.gethostname(), path, same))
    first_host, first_path, _ = gathered[0]
    for process, (host, its_path, same) in enumerate(gathered):
        if not same:
            raise UserError(
                f"{setting}={its_path} of process {process} on {host} is not the folder of process "
                f"0 ({first_path} on {first_host}); {SHARED}"
            )


def check_same_facts(facts: Mapping[str, str]) -> None:
    """Check that the named values are equal on all processes, which all must call this.

    Raises `UserError`, the same on every process, with the names and values of the first process
    that differs from process 0. (`multihost_utils.assert_equal` does not name the difference.)
    """
    gathered = gather((socket.gethostname(), dict(facts)))
    expected = gathered[0][1]
    for process, (host, values) in enumerate(gathered):
        different = [
            f"{name}: {values.get(name)} instead of {expected.get(name)}"
            for name in sorted(expected.keys() | values.keys())
            if values.get(name) != expected.get(name)
        ]
        if different:
            more = f" and {len(different) - 6} more" * (len(different) > 6)
            raise UserError(
                f"process {process} on {host} differs from process 0 in "
                f"{'; '.join(different[:6])}{more}; start every process with the same command, "
                f"files and code; {SHARED}"
            )

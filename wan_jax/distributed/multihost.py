"""Several processes, on one host or many, that run the same program as one (`jax.distributed`).

Every process sees all devices and runs the same jitted programs in the same order; host code works
on the rows of a batch that lie on the process's own devices, and `gather` brings the results
together. With one process everything here is the identity.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import os
import pickle
import re
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
from wan_jax.distributed.watchdog import AGAIN, Watch
from wan_jax.errors import UserError

CLUSTERS = ("auto", "none", "slurm", "ompi", "k8s")
CHUNK = 2**22  # bytes of one collective
FOLDER_SECONDS = 10  # until what process 0 wrote must be seen by the others
SHARED = "see docs/hosts.md, What must be shared"
# variables of a launcher: processes, this one's number, what JAX's own detection needs beside them,
# who shares the host
LAUNCHERS = {
    "slurm": ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE"),
    "ompi": (
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_MCA_orte_hnp_uri",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
}
_watch: Watch | None = None


@dataclasses.dataclass(frozen=True)
class Launch:
    """How this process finds the others: the three values, or a launcher that JAX detects them
    from.
    """

    coordinator: str | None = None  # host:port of process 0
    processes: int | None = None
    process: int | None = None
    cluster: str | None = None
    all_devices: bool = True  # of the host; False: one of them, as processes share it


def choose(
    cluster: str,
    coordinator: str | None,
    processes: int | None,
    process: int | None,
    environ: Mapping[str, str],
) -> Launch | None:
    """What the flags and a launcher's variables ask for; None: one process.

    Raises `UserError` on flags that are incomplete or contradict each other, and on a launcher that
    is not there.
    """
    given = {"--coordinator": coordinator, "--num_processes": processes, "--process_id": process}
    missing = [name for name, value in given.items() if value is None]
    if cluster not in CLUSTERS:
        raise UserError(f"--cluster={cluster}: choose one of {', '.join(CLUSTERS)}")
    if len(missing) < 3:
        if missing:
            raise UserError(
                f"{', '.join(given)} belong together: {' and '.join(missing)} not given"
            )
        if cluster not in ("auto", "none"):
            raise UserError(
                f"--cluster={cluster} finds what --coordinator, --num_processes and --process_id "
                "say: give one or the other"
            )
        name, _, port = coordinator.rpartition(":")
        if not name or not port.isdigit() or not 0 < int(port) < 2**16:
            raise UserError(
                f"--coordinator={coordinator}: must be host:port of process 0, the port a free one "
                "of its host, e.g. node1:8476"
            )
        if processes < 1 or not 0 <= process < processes:
            raise UserError(
                f"--process_id={process} of --num_processes={processes}: must be from 0 to the "
                "number of processes less one, another one for each process"
            )
        return Launch(coordinator, processes, process) if processes > 1 else None
    if cluster == "none":
        return None
    if cluster == "k8s":
        if "JOB_COMPLETION_INDEX" not in environ:
            raise UserError(
                "--cluster=k8s: JOB_COMPLETION_INDEX is not set; it is in the pods of an indexed "
                "Job (completionMode: Indexed)"
            )
        return Launch(cluster="k8s")
    for name, (size, rank, address, shared) in LAUNCHERS.items():
        if cluster not in ("auto", name):
            continue
        if rank not in environ or not environ.get(size, "").isdigit():
            if cluster == name:
                raise UserError(
                    f"--cluster={name}: {rank} is not set; start the program with "
                    f"{'srun' if name == 'slurm' else 'mpirun'}"
                )
            continue
        if environ[size] == "1":
            continue
        if address not in environ:
            if name == "slurm" and cluster == "auto":
                continue  # a batch script's own shell: only srun starts the tasks
            raise UserError(
                f"{address} is not set, so the first host's address is not "
                f"known{' (Open MPI 5 leaves it out)' if name == 'ompi' else ''}: give "
                f"--coordinator=HOST:PORT --num_processes=${size} --process_id=${rank}"
            )
        return Launch(
            cluster=name,
            all_devices=re.fullmatch(r"1(\(x\d+\))?", environ.get(shared, "")) is not None,
        )
    return None


@contextlib.contextmanager
def joined(
    launch: Launch | None,
    timeout: float = 100,
    stage_timeout: float = 7200,
    join_timeout: float = 300,
) -> Iterator[None]:
    """Around the program: finds the other processes, and ends this one for good when it or another
    fails.

    timeout: seconds after which a silent process ends the run on all others; stage_timeout: seconds
    in which some process must begin a new `stage`, 0 for ever; join_timeout: seconds to wait for
    all processes at the start. Call it before anything of JAX runs. Raises `UserError` when JAX
    refuses what was asked for; later errors are printed as `cli.run` prints them, and the process
    ends here, without waiting for the others.
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
    _join(launch, timeout, join_timeout)
    process, count = jax.process_index(), jax.process_count()
    me = f"process {process} on {socket.gethostname()}"
    from jax._src import distributed  # the key-value store has no public name

    _watch = Watch(
        distributed.global_state.client,
        process,
        count,
        socket.gethostname(),
        timeout,
        stage_timeout,
    )
    native_output.set_message(
        f"error: {me} lost process 0, the coordinator: it died, hangs, or the network is down; "
        f"{AGAIN}"
    )
    try:
        yield
        stage("waiting for all processes to finish")
        gather(None)
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        known = cli.explain(error)
        if known is None:
            if lost := _watch.lost():
                _watch.fail(lost)
            traceback.print_exc()
        text, code = known or (f"error: {me} failed: {type(error).__name__}", 1)
        _watch.fail(
            f"{me} ended the run: {' '.join(text.removeprefix('error: ').split())}",
            code,
            shown=text,
        )
    _watch.close()
    _watch = None
    jax.distributed.shutdown()


def _join(launch: Launch, timeout: float, join_timeout: float) -> None:
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
    # Python's handler would wait for the connection
    interrupted = signal.signal(signal.SIGINT, signal.SIG_DFL)
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
            # the watch is faster, and says what happened
            heartbeat_timeout_seconds=int(3 * timeout + 10),
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"{problem}: {' '.join(str(error).split())[:300]}") from error
    finally:
        signal.signal(signal.SIGINT, interrupted)


def first() -> bool:
    """Whether this process writes and prints for all."""
    return jax.process_index() == 0


def stage(name: str) -> None:
    """Says what this process begins now, for the message should it hang there. Ctrl-C of before
    ends it here at the latest.
    """
    cli.stop_if_interrupted()
    if _watch:
        _watch.stage(name)


def gather(value: Any) -> list:
    """Every process's value, in the order of the processes, on every process, which all must call
    this. Exact: what travels is the pickled value, as bytes. Raises ValueError from 4 GiB on.
    """
    if jax.process_count() == 1:
        return [value]
    data = pickle.dumps(value)
    if len(data) >= 2**32:
        raise ValueError(f"{len(data)} bytes are more than can be gathered at once, 4 GiB")
    sizes = multihost_utils.process_allgather(np.uint32(len(data)))
    parts = [multihost_utils.process_allgather(piece) for piece in _pieces(data, int(sizes.max()))]
    return [
        pickle.loads(b"".join(part[p].tobytes() for part in parts)[:size])
        for p, size in enumerate(sizes)
    ]


def from_first(make: Callable[[], Any]) -> Any:
    """make() of process 0, on every process; the others do not call it. Exact, as `gather`."""
    if jax.process_count() == 1:
        return make()
    value = make() if first() else None
    data = pickle.dumps(value) if first() else b""
    high, low = multihost_utils.broadcast_one_to_all(np.array(divmod(len(data), 2**31), np.int32))
    size, end = int(high) * 2**31 + int(low), 0
    received = bytearray(0 if first() else size)
    for piece in _pieces(data, size):
        sent = multihost_utils.broadcast_one_to_all(piece)
        begin, end = end, min(end + len(piece), size)
        if not first():
            received[begin:end] = sent[: end - begin].data
    return value if first() else pickle.loads(received)


def _pieces(data: bytes, size: int) -> Iterator[np.ndarray]:
    """`data`, filled up to `size` bytes, in uint8 arrays of a power of two up to `CHUNK`: few
    shapes to compile.
    """
    width = min(CHUNK, max(1024, 1 << max(size - 1, 0).bit_length()))
    for start in range(0, size, width):
        yield np.frombuffer(data[start : start + width].ljust(width, b"\0"), np.uint8)


def my_rows(sharding: jax.sharding.Sharding, count: int) -> np.ndarray:
    """The rows of a batch of `count`, sharded over its only axis, that this process answers for:
    int [n], ascending.

    Rows that lie on several devices are its own where the first of these is, so that every row is
    one process's.
    """
    owner = {}
    for device, index in sharding.devices_indices_map((count,)).items():
        owner.setdefault(index[0].indices(count)[:2], device.process_index)
    mine = [
        np.arange(*span)
        for span, process in sorted(owner.items())
        if process == jax.process_index()
    ]
    return np.concatenate([np.arange(0), *mine])


def my_part(x: jax.Array) -> np.ndarray:
    """Those rows of x [B, ...], on the host: [n, ...], n 0 where other processes answer for all
    that lie here. Raises ValueError when another axis is sharded too.
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
    return np.concatenate(
        [np.zeros((0, *x.shape[1:]), x.dtype), *(np.asarray(shards[at]) for at in sorted(shards))]
    )


def check_same_folder(setting: str, path: str, read: Callable[[], str | None]) -> None:
    """Checks that `path` leads every process to the folder of process 0; all must call this.

    read: reads a file in that folder whose content tells it from others; None where it is not
    there. What process 0 reads must become visible to the others within `FOLDER_SECONDS`, a time
    for network file systems. Raises `UserError`, the same on every process.
    """
    wanted = from_first(read)
    deadline = time.monotonic() + FOLDER_SECONDS
    while not (same := read() == wanted) and time.monotonic() < deadline:
        time.sleep(0.2)
    seen = gather((socket.gethostname(), path, same))
    for process, (host, there, same) in enumerate(seen):
        if not same:
            raise UserError(
                f"{setting}={there} of process {process} on {host} is not the folder of process 0 "
                f"({seen[0][1]} on {seen[0][0]}); {SHARED}"
            )


def check_same_facts(facts: Mapping[str, str]) -> None:
    """Checks that the named values are equal on all processes, which all must call this. Raises
    `UserError` with the names and values of the first process that differs from process 0, the same
    on every process.
    """
    seen = gather((socket.gethostname(), dict(facts)))
    first_facts = seen[0][1]
    for process, (host, there) in enumerate(seen):
        different = [
            f"{name}: {there.get(name)} instead of {first_facts.get(name)}"
            for name in sorted(first_facts.keys() | there.keys())
            if there.get(name) != first_facts.get(name)
        ]
        if different:
            more = f" and {len(different) - 6} more" * (len(different) > 6)
            raise UserError(
                f"process {process} on {host} differs from process 0 in "
                f"{'; '.join(different[:6])}{more}; start every process with the same command, "
                f"files and code; {SHARED}"
            )


def replica_digests(tree) -> dict[tuple[int, ...], dict[int, str]]:
    """Computes SHA-256 digests of what this process holds of a tree of arrays and another device or
    process holds too.

    For each set of devices that hold the same shards, {device: digest of all these shards}; an
    array of this process alone, which every process has for itself, is under () and the number of
    the process. A shard that one device holds has no other copy to compare it with, and is left
    out.
    """
    places, alone = {}, hashlib.sha256()  # {device: {set of devices: [(name, shard)]}}
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path)
        if jax.process_count() > 1 and x.is_fully_addressable:
            alone.update(name.encode() + np.asarray(x).tobytes())
            continue
        holders = {}
        for device, index in x.sharding.devices_indices_map(x.shape).items():
            holders.setdefault(repr(index), []).append(device.id)
        for shard in x.addressable_shards:
            devices = tuple(sorted(holders[repr(shard.index)]))
            if len(devices) > 1:
                places.setdefault(shard.device.id, {}).setdefault(devices, []).append(
                    (f"{name}{shard.index}", shard.data)
                )

    def of_device(groups) -> dict[tuple[int, ...], str]:
        return {devices: _shards_digest(shards) for devices, shards in groups.items()}

    with concurrent.futures.ThreadPoolExecutor(max(1, len(places))) as threads:
        found = dict(zip(places, threads.map(of_device, places.values())))
    digests = {(): {jax.process_index(): alone.hexdigest()}}
    for device, groups in found.items():
        for devices, digest in groups.items():
            digests.setdefault(devices, {})[device] = digest
    return digests


def _shards_digest(shards: list[tuple[str, jax.Array]]) -> str:
    sha = hashlib.sha256()
    for name, data in shards:
        # a new array over the same memory: `data` itself would keep its copy on the host
        data = jax.make_array_from_single_device_arrays(data.shape, data.sharding, [data])
        sha.update(name.encode() + np.asarray(data).tobytes())
    return sha.hexdigest()


def check_same(tree, what: str) -> None:
    """Raises `UserError` unless all devices and processes that hold the same shards of the tree
    hold the same bits.

    Weights that are split over all devices have no second copy, so of these nothing can be
    compared.
    """
    seen = gather(replica_digests(tree) if jax.process_count() > 1 else {})
    copies = {}  # {set of devices: [(process, digest)]}
    for process, digests in enumerate(seen):
        for devices, of_device in digests.items():
            copies.setdefault(devices, []).extend(
                (process, digest) for digest in of_device.values()
            )
    wrong = {
        process: held[0][0]
        for held in copies.values()
        for process, digest in held
        if digest != held[0][1]
    }
    if wrong:
        process = min(wrong)
        other = (
            f"those of process {wrong[process]}"
            if wrong[process] != process
            else "each other on its devices"
        )
        raise UserError(
            f"{what} of process {process} differ from {other} ({len(wrong)} of {len(seen)} "
            "processes do): a device or host computes wrongly; run the same command again without "
            "it: it continues after the last checkpoint"
        )

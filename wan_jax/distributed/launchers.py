"""How a process finds the other processes of a run: by flags, or by the variables of a launcher
(Slurm, Open MPI, Kubernetes).
"""

import dataclasses
import re
from collections.abc import Mapping

from wan_jax.errors import UserError

CLUSTERS = ("auto", "none", "slurm", "ompi", "k8s")


@dataclasses.dataclass(frozen=True)
class LauncherVariables:
    """The environment variables that a launcher sets for each process."""

    processes: str  # number of processes
    process: str  # index of this process
    address: str  # of the first host, which JAX's own detection needs as well
    per_host: str  # number of processes that share this host


LAUNCHERS = {
    "slurm": LauncherVariables(
        "SLURM_NTASKS", "SLURM_PROCID", "SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE"
    ),
    "ompi": LauncherVariables(
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_MCA_orte_hnp_uri",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
}


@dataclasses.dataclass(frozen=True)
class Launch:
    """How this process finds the others: the first three values, or a launcher from which JAX
    detects them.
    """

    coordinator: str | None = None  # host:port of process 0
    processes: int | None = None
    process: int | None = None
    cluster: str | None = None
    all_devices: bool = True  # of the host; False: one of them, because processes share the host


def choose(
    cluster: str,
    coordinator: str | None,
    processes: int | None,
    process: int | None,
    environ: Mapping[str, str],
) -> Launch | None:
    """Return what the flags and the variables of a launcher request; None for a single process.

    Raises `UserError` on flags that are incomplete or contradict each other, and when the requested
    launcher has not started this process.
    """
    given = {"--coordinator": coordinator, "--num_processes": processes, "--process_id": process}
    missing = [name for name, value in given.items() if value is None]
    if cluster not in CLUSTERS:
        raise UserError(f"--cluster={cluster}: choose one of {', '.join(CLUSTERS)}")
    if coordinator is not None and processes is not None and process is not None:
        return _from_flags(cluster, coordinator, processes, process)
    if len(missing) < 3:
        raise UserError(f"{', '.join(given)} belong together: {' and '.join(missing)} not given")
    if cluster == "none":
        return None
    if cluster == "k8s":
        if "JOB_COMPLETION_INDEX" not in environ:
            raise UserError(
                "--cluster=k8s: JOB_COMPLETION_INDEX is not set; it is in the pods of an indexed "
                "Job (completionMode: Indexed)"
            )
        return Launch(cluster="k8s")
    for name in LAUNCHERS if cluster == "auto" else (cluster,):
        if (launch := _from_launcher(name, cluster, environ)) is not None:
            return launch
    return None


def _from_flags(cluster: str, coordinator: str, processes: int, process: int) -> Launch | None:
    if cluster not in ("auto", "none"):
        raise UserError(
            f"--cluster={cluster} finds the values of --coordinator, --num_processes and "
            "--process_id: give one or the other"
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise UserError(
            f"--coordinator={coordinator}: must be host:port of process 0, the port a free one "
            "of its host, e.g. node1:8476"
        )
    if processes < 1 or not 0 <= process < processes:
        raise UserError(
            f"--process_id={process} of --num_processes={processes}: must be from 0 to "
            "--num_processes - 1, and different for each process"
        )
    return Launch(coordinator, processes, process) if processes > 1 else None


def _from_launcher(name: str, cluster: str, environ: Mapping[str, str]) -> Launch | None:
    variables = LAUNCHERS[name]
    if variables.process not in environ or not environ.get(variables.processes, "").isdigit():
        if cluster == name:
            raise UserError(
                f"--cluster={name}: {variables.process} is not set; start the program with "
                f"{'srun' if name == 'slurm' else 'mpirun'}"
            )
        return None
    if environ[variables.processes] == "1":
        return None
    if variables.address not in environ:
        if name == "slurm" and cluster == "auto":
            return None  # the shell of a batch script: only srun starts the tasks
        raise UserError(
            f"{variables.address} is not set, so the address of the first host is not "
            f"known{' (Open MPI 5 leaves it out)' if name == 'ompi' else ''}: give "
            f"--coordinator=HOST:PORT --num_processes=${variables.processes} "
            f"--process_id=${variables.process}"
        )
    alone_on_host = re.fullmatch(r"1(\(x\d+\))?", environ.get(variables.per_host, ""))
    return Launch(cluster=name, all_devices=alone_on_host is not None)

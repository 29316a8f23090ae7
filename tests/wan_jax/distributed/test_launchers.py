"""How a process finds the others: flags, and the variables of launchers."""

import re

import pytest

from wan_jax.distributed.launchers import Launch, choose
from wan_jax.errors import UserError

NO_FLAGS = ("auto", None, None, None)
SLURM = {
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_STEP_TASKS_PER_NODE": "2",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_MCA_orte_hnp_uri": "1.0;tcp://node1:34911",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
}


def without(values: dict, name: str) -> dict:
    return {key: value for key, value in values.items() if key != name}


@pytest.mark.parametrize(
    "flags, environ, launch",
    [
        (NO_FLAGS, {}, None),
        (("auto", "node:1", 1, 0), {}, None),
        (("auto", "node:1", 3, 2), SLURM, Launch("node:1", 3, 2)),
        (NO_FLAGS, SLURM, Launch(cluster="slurm", all_devices=False)),
        (NO_FLAGS, SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, Launch(cluster="slurm")),
        (NO_FLAGS, SLURM | {"SLURM_NTASKS": "1"}, None),
        (NO_FLAGS, without(SLURM, "SLURM_STEP_NODELIST"), None),  # the shell of a batch script
        (("none", None, None, None), SLURM, None),
        (NO_FLAGS, OPEN_MPI, Launch(cluster="ompi")),
        (("k8s", None, None, None), {"JOB_COMPLETION_INDEX": "0"}, Launch(cluster="k8s")),
    ],
)
def test_what_is_requested(flags, environ, launch):
    assert choose(*flags, environ) == launch


@pytest.mark.parametrize(
    "flags, environ, values",
    [
        (("auto", "node:1", None, None), {}, ["--num_processes", "--process_id"]),
        (("auto", None, 2, 0), {}, ["--coordinator"]),
        (("auto", "node", 2, 0), {}, ["--coordinator=node"]),
        (("auto", "node:99999", 2, 0), {}, ["--coordinator=node:99999"]),
        (("auto", "node:1", 2, 2), {}, ["--process_id=2", "--num_processes=2"]),
        (("auto", "node:1", 0, 0), {}, ["--num_processes=0"]),
        (("slurm", "node:1", 2, 0), {}, ["--cluster=slurm"]),
        (("slurm", None, None, None), {}, ["--cluster=slurm", "SLURM_PROCID"]),
        (("ompi", None, None, None), {}, ["--cluster=ompi", "OMPI_COMM_WORLD_RANK"]),
        (("k8s", None, None, None), {}, ["--cluster=k8s", "JOB_COMPLETION_INDEX"]),
        (("pbs", None, None, None), {}, ["--cluster=pbs"]),
        (NO_FLAGS, without(OPEN_MPI, "OMPI_MCA_orte_hnp_uri"), ["OMPI_MCA_orte_hnp_uri"]),
    ],
)
def test_what_is_missing_or_wrong_is_named(flags, environ, values):
    with pytest.raises(UserError) as caught:
        choose(*flags, environ)
    assert all(value in str(caught.value) for value in values)


@pytest.mark.parametrize(
    "given, message",
    [
        (("auto", "node:1", None, None), "--num_processes and --process_id not given"),
        (("auto", None, 2, 0), "--coordinator not given"),
        (("auto", "node", 2, 0), "host:port"),
        (("auto", "node:99999", 2, 0), "host:port"),
        (("auto", "node:1", 2, 2), "--process_id=2"),
        (("auto", "node:1", 0, 0), "--num_processes=0"),
        (("slurm", "node:1", 2, 0), "one or the other"),
        (("slurm", None, None, None), "srun"),
        (("ompi", None, None, None), "mpirun"),
        (("k8s", None, None, None), "completionMode: Indexed"),
    ],
)
def test_half_given_flags_are_one_message(given, message):
    with pytest.raises(UserError, match=re.escape(message)):
        choose(*given, {})

"""Training in two processes of four simulated devices: the same as one of eight, and the end of one
is the end of both.

The launchers are played by their environment variables, which JAX reads; the collectives are
gloo's, over TCP.
"""

import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import time

import numpy as np
import pytest

from tests import commands
from tests.grpo import hosts_main
from tests.grpo.data_folders import write_data
from tests.grpo.here import train_here
from tests.grpo.tiny_run import newest, write_recipe
from wan_jax.command_line.cli import UserError
from wan_jax.distributed import launchers
from wan_jax.storage.checkpoint import read_numpy

TIMEOUT = 5  # --host_timeout
SETTINGS = (
    "sample.batch_size=8",
    "sample.group_size=8",
    "train.updates_per_epoch=1",
    "train.box_credit=0.5",
    "reward.workers=1",
    "train.learning_rate=1e-3",
    "save.keep=9",
)
AGAIN = "run the same command again"


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])


def flags_of(process, port):
    return {}, (f"--coordinator=127.0.0.1:{port}", "--num_processes=2", f"--process_id={process}")


def slurm(process, port):
    return {
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_LOCALID": str(process),
        "SLURM_PROCID": str(process),
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "JAX_COORDINATOR_PORT": port,
    }, ()


def open_mpi(process, port):
    return {
        "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911",
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": str(process),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(process),
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
        "JAX_COORDINATOR_PORT": port,
    }, ()


class Processes:
    """One run. Their output goes to files of the folder. hash_seeds: of Python, one for both or one
    each.
    """

    def __init__(self, config, epochs, launcher, hash_seeds=1):
        self.folder, port = config.parent, free_port()
        self.files, self.all = [], []
        for i in range(2):
            extra, flags = launcher(i, port)
            env = commands.environment(devices=4, **extra) | {
                "JAX_COMPILATION_CACHE_DIR": str(config.parent.parent / "cache"),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            }
            self.files.append([config.parent / f"{name}{i}" for name in ("out", "err")])
            with open(self.files[i][0], "w") as out, open(self.files[i][1], "w") as err:
                self.all.append(
                    subprocess.Popen(
                        (commands.fresh if i < hash_seeds - 1 else commands.command)(
                            "tests.grpo.hosts_main",
                            config.parent,
                            f"--config={config}",
                            f"--config.epochs={epochs}",
                            *(f"--config.{s}" for s in SETTINGS),
                            *flags,
                            f"--host_timeout={TIMEOUT}",
                            "--join_timeout=60",
                        ),
                        env=env,
                        stdout=out,
                        stderr=err,
                        cwd=pathlib.Path(__file__).parents[2],
                    )
                )

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for process in self.all:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            process.wait()

    def text(self, i):
        """(standard output, standard error) so far."""
        return tuple(path.read_text() for path in self.files[i])

    def finish(self):
        codes = [process.wait(timeout=200) for process in self.all]
        assert codes == [0] * len(codes), [self.text(i) for i in range(len(codes))]

    def until(self, seen):
        """Waits for `seen` in the output of process 0."""
        deadline = time.time() + 150
        while seen not in self.text(0)[0]:
            assert time.time() < deadline and all(p.poll() is None for p in self.all), (
                self.text(0),
                self.text(1),
            )
            time.sleep(0.02)

    def ends_alone(self, i, victim, number):
        """Sends `number` to the victim; (exit code, seconds, standard error) of process i after
        that.
        """
        os.kill(commands.process_id(self.all[victim]), number)
        start = time.time()
        code = self.all[i].wait(timeout=60)
        seconds = time.time() - start
        time.sleep(0.5)  # the reader behind a process that aborts says so after its end
        return code, seconds, self.text(i)[1]


def entered(folder, process, epoch):
    with np.load(folder / f"{process}_{epoch}.npz") as file:
        return {name: file[name] for name in file.files}


def write_run(model, folder):
    """Write a recipe whose updates also train on data of another size; return its file."""
    config, _ = write_recipe(model, folder)
    write_data(folder / "data", (1, 2, 4, 16), height=16, width=32, text_dim=24)
    setting = f"c.data.path, c.data.weight = {str(folder / 'data')!r}, 0.5\n    return c"
    config.write_text(config.read_text().replace("return c", setting))
    return config


def train_alone(config, epochs):
    """In this process, whose simulated devices are eight."""
    with pytest.MonkeyPatch.context() as patch:
        hosts_main.record(config.parent, patch.setattr)
        train_here(config, *SETTINGS, f"epochs={epochs}", devices=8)


@pytest.fixture(scope="module")
def one(model, tmp_path_factory):
    """Two epochs in one process, with data: the folder."""
    config = write_run(model, tmp_path_factory.mktemp("one"))
    train_alone(config, 2)
    return config.parent


@pytest.fixture(scope="module")
def two(model, tmp_path_factory):
    """The same in two processes, started by Slurm's variables: (config file, folder, standard
    output and error).
    """
    config = write_run(model, tmp_path_factory.mktemp("two"))
    with Processes(config, 2, slurm, hash_seeds=2) as run:
        run.finish()
        return config, config.parent, [run.text(0), run.text(1)]


@pytest.mark.slow
def test_both_hold_the_same_bits(two):
    """One compiled function runs in both on equal inputs, and an all-reduce gives every process the
    same sum.
    """
    _, folder, _ = two
    seen = [entered(folder, 0, epoch) for epoch in (0, 1, 2)]
    for epoch in (1, 2):
        other = entered(folder, 1, epoch)
        assert seen[epoch].keys() == other.keys() == {"digest", "rewards", "advantages"}
        for name, value in seen[epoch].items():
            np.testing.assert_array_equal(value, other[name], err_msg=f"epoch {epoch}: {name}")
    assert len({str(s["digest"]) for s in seen}) == 3  # it learnt something
    assert not np.array_equal(seen[1]["rewards"], seen[2]["rewards"])


@pytest.mark.slow
def test_as_in_one_process(one, two):
    """Equal up to rounding: two processes run other compiled functions than one, and gloo sums in
    another order.

    A latent that rounds differently can move a pixel by one of its 255 levels; 1 % of the pixels
    are granted that. `Brightness` weights no pixel by more than twice the mean, which bounds the
    rewards, and through their standard deviation the advantages. Adam scales each gradient to one
    size, also those that are nothing but rounding, so the weights are compared by the norm of their
    change.
    """
    _, folder, _ = two
    pixels = 0.01
    reward = 2 * pixels / 255
    for epoch in (1, 2):
        a, b = entered(one, 0, epoch), entered(folder, 0, epoch)
        std = a["rewards"].std()
        assert std > 50 * reward
        np.testing.assert_allclose(b["rewards"], a["rewards"], rtol=0, atol=reward)
        np.testing.assert_allclose(b["advantages"], a["advantages"], rtol=0, atol=2 * reward / std)
    start, a, b = (
        np.concatenate([v.ravel() for _, v in sorted(read_numpy(path).items())])
        for path in (
            one / "run/checkpoints/0/trained",
            one / "run/checkpoints/2/trained",
            folder / "run/checkpoints/2/trained",
        )
    )
    assert np.linalg.norm(b - a) < 0.02 * np.linalg.norm(a - start)
    errors = [
        [json.loads(line)["data_error"] for line in (path / "run/metrics.jsonl").open()]
        for path in (one, folder)
    ]
    np.testing.assert_allclose(
        *errors, rtol=1e-3
    )  # the weights differ by up to 2 % of their change
    evaluations = [
        [json.loads(line) for line in (path / "run/evals.jsonl").read_text().splitlines()]
        for path in (one, folder)
    ]
    for x, y in zip(*evaluations, strict=True):
        np.testing.assert_allclose(y["rewards"], x["rewards"], rtol=0, atol=reward)
        # `Brightness` tells the first one of each video
        levels = [np.array(e["texts"], int) for e in (x, y)]
        assert np.abs(levels[1] - levels[0]).max() <= 1
    previews = [
        np.load(path / "run/previews/eval_000000.npz")["videos"].astype(int)
        for path in (one, folder)
    ]
    apart = np.abs(previews[1] - previews[0])
    assert apart.max() <= 1 and apart.mean() <= pixels


@pytest.mark.slow
def test_the_first_writes_and_prints(two):
    _, folder, ((out, err), (other_out, other_err)) = two
    assert "8 x cpu on 2 processes" in out and "report.html" in out.splitlines()[-1]
    assert not other_out and not err and not other_err, (err, other_out, other_err)
    assert len((folder / "run/metrics.jsonl").read_text().splitlines()) == 2
    assert (folder / "run/report.html").is_file()


@pytest.mark.slow
def test_faults_end_the_others_and_the_run_resumes(two, capsys):
    """One run: the coordinator is killed, the second process hangs, SIGTERM reaches it; then one
    process goes on.
    """
    config, folder, _ = two
    # by JAX, whose other threads may find what they use torn down
    aborted = -signal.SIGABRT, -signal.SIGSEGV
    for launcher, victim, number, epochs, codes, message in (
        (flags_of, 0, signal.SIGKILL, 0, (1, *aborted), "process 0, the coordinator"),
        (open_mpi, 1, signal.SIGSTOP, 2, (1,), "process 1 on .* not been heard of"),
    ):
        before = newest(folder / "run")
        with Processes(config, 1000, launcher) as run:
            run.until(f"epoch {before + epochs}/" if epochs else "continuing")
            code, seconds, err = run.ends_alone(1 - victim, victim, number)
            out = run.text(0)[0]
        assert f"after epoch {before}" in out
        assert code in codes and seconds < TIMEOUT + 5, (code, seconds, err)
        assert re.search(message, err) and AGAIN in err and len(err.strip().splitlines()) == 1, err
        assert newest(folder / "run") >= before + max(epochs - 1, 0)
    before = newest(folder / "run")
    with Processes(config, 1000, flags_of) as run:
        run.until("continuing")
        code, _, err = run.ends_alone(0, 1, signal.SIGTERM)
        assert code == run.all[1].wait(timeout=60) == 143, err
    last = newest(folder / "run")
    assert last > before and f"ended by SIGTERM after epoch {last}, which is saved" in err, err
    train_alone(config, last + 1)
    assert f"continuing {folder / 'run'} after epoch {last}" in capsys.readouterr().out
    assert newest(folder / "run") == last + 1
    epochs = [
        json.loads(line)["epoch"]
        for line in (folder / "run/metrics.jsonl").read_text().splitlines()
    ]
    assert epochs == list(range(1, last + 2))


@pytest.mark.slow
def test_an_error_of_one_process_ends_both(model, tmp_path):
    """A file where process 0's folder should be: it says so, and the other one says who ended the
    run.
    """
    config, run_folder = write_recipe(model, tmp_path)
    (tmp_path / "blocked").write_text("")
    text = config.read_text().replace(repr(str(run_folder)), "__import__('os').environ['RUN']")
    config.write_text(text)

    def launcher(process, port):
        return {"RUN": str(tmp_path / "blocked" / "run" if process == 0 else run_folder)}, flags_of(
            process, port
        )[1]

    with Processes(config, 1, launcher) as run:
        codes = [process.wait(timeout=60) for process in run.all]
        errors = [run.text(i)[1] for i in (0, 1)]
    assert codes == [1, 1], errors
    assert (
        "blocked" in errors[0]
        and errors[0].startswith("error: ")
        and len(errors[0].splitlines()) == 1
    ), errors
    assert (
        "process 0 on" in errors[1] and "ended the run" in errors[1] and "blocked" in errors[1]
    ), errors


def test_what_a_launcher_says():
    nothing = ("auto", None, None, None)
    assert launchers.choose(*nothing, {}) is None
    assert launchers.choose("auto", "node:1", 1, 0, {}) is None
    assert launchers.choose("auto", "node:1", 3, 2, slurm(0, "1")[0]) == launchers.Launch(
        "node:1", 3, 2
    )
    step = slurm(1, "1")[0]
    assert launchers.choose(*nothing, step) == launchers.Launch(cluster="slurm", all_devices=False)
    assert launchers.choose(
        *nothing, step | {"SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
    ) == launchers.Launch(cluster="slurm")
    assert launchers.choose(*nothing, step | {"SLURM_NTASKS": "1"}) is None
    assert launchers.choose("none", None, None, None, step) is None
    del step["SLURM_STEP_NODELIST"]  # the batch script itself, not a task of srun
    assert launchers.choose(*nothing, step) is None
    mpi = open_mpi(1, "1")[0]
    assert launchers.choose(
        *nothing, mpi | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}
    ) == launchers.Launch(cluster="ompi")
    del mpi["OMPI_MCA_orte_hnp_uri"]
    with pytest.raises(UserError, match=r"Open MPI 5.*--process_id=\$OMPI_COMM_WORLD_RANK"):
        launchers.choose(*nothing, mpi)
    assert launchers.choose(
        "k8s", None, None, None, {"JOB_COMPLETION_INDEX": "0"}
    ) == launchers.Launch(cluster="k8s")

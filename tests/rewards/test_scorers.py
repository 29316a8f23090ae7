"""The worker processes of a pool: what they load, and when they end."""

import os
import pathlib
import subprocess
import sys
import time

from rewards.ocr.rules import OCRReward
from rewards.pool import RewardPool
from tests.rewards import pool_rewards
from tests.rewards.drawing import filled

ROOT = pathlib.Path(__file__).parents[2]


def test_workers_ignore_ctrl_c():
    with RewardPool(pool_rewards.Interrupted, 1) as pool:
        scores = pool.submit(filled(1), ["a"]).result()
        assert scores.values.tolist() == [7] and scores.retries == 0
        assert os.getpgid(pool._scorers[0]._process.pid) != os.getpgid(0)


def test_workers_are_processes_of_their_own_without_jax():
    import jax  # noqa: F401  (a trainer has imported it)

    with RewardPool(pool_rewards.Environment, 2) as pool:
        scores = pool.submit(filled(*range(2, 10)), [None] * 8).result()
        assert set(scores.texts) == {"[] OMP=1"}
        assert os.getpid() not in scores.values


def test_ocr_workers_do_not_load_jax():
    with (
        RewardPool(OCRReward, 1) as pool,
        open(f"/proc/{pool._scorers[0]._process.pid}/maps") as maps,
    ):
        assert "jaxlib" not in maps.read()


def test_workers_end_with_their_parent():
    """Also when the parent is killed and cannot close the pool."""
    script = (
        "import sys, time; from tests.rewards import pool_rewards; from rewards.pool import RewardPool\n"
        "pool = RewardPool(pool_rewards.Mean, 1)\n"
        "print(pool._scorers[0]._process.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    worker = int(parent.stdout.readline())
    assert os.path.exists(f"/proc/{worker}")
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 10
    while runs(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not runs(worker)


def runs(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False

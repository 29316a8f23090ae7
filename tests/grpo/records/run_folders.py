"""Small records of a run."""

import numpy as np

from grpo.records.run_log import RunLog


def evaluation(epoch):
    return {
        "epoch": epoch,
        "reward": 0.5,
        "low": 0.4,
        "high": 0.6,
        "num": 2,
        "rewards": [0.5, float("nan")],
        "prompts": ['say "hé"', "b"],
        "texts": ["hé", ""],
        "seconds": 1.0,
    }


def write(folder, epochs, resume=None, evals=()):
    log = RunLog(folder, resume)
    for e in epochs:
        log.epoch({"epoch": e, "loss": e / 10, "seconds": {"sample": 1.0, "update": 2.0}})
        if e in evals:
            log.evaluation(evaluation(e), np.full((2, 1, 4, 6, 3), e, np.uint8))
    log.close()

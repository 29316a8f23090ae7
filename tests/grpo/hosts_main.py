"""`grpo.train` with a reward that depends on every pixel, and a record of what each process
computed.

    python -m tests.grpo.hosts_main FOLDER --config=... [--coordinator=...]

FOLDER/<process>_<epoch>.npz: the rewards and advantages that entered the update, and the digest of
every trained array, optimiser state and moving average as this process holds it when it saves.
"""

import hashlib
import pathlib
import sys

import jax
import numpy as np

from grpo import credit, train
from grpo.learning import train_state
from rewards.pool import RewardPool
from tests.rewards.pool_rewards import Boxed
from wan_jax.command_line import cli, flag_source
from wan_jax.distributed import multihost

group_advantages, write = credit.group_advantages, train_state.save


def record(folder: pathlib.Path, replace=setattr) -> None:
    """Make training use that reward and keep that record. replace: as `setattr`."""
    entered = {}

    def advantages(rewards, *args, **kwargs):
        entered.update(rewards=rewards, advantages=group_advantages(rewards, *args, **kwargs))
        return entered["advantages"]

    def save(checkpoints, epoch, states, *args):
        sha = hashlib.sha256()
        for leaf in jax.tree.leaves(states):
            for shard in leaf.addressable_shards:
                sha.update(np.asarray(shard.data).tobytes())
        np.savez(folder / f"{jax.process_index()}_{epoch}.npz", digest=sha.hexdigest(), **entered)
        write(checkpoints, epoch, states, *args)

    replace(credit, "group_advantages", advantages)
    replace(train_state, "save", save)
    replace(train, "open_pool", lambda c, *_, **boxes: RewardPool(Boxed, workers=c.workers))
    replace(multihost, "CHUNK", 2**12)  # so that the prompts' embeddings come in several pieces


if __name__ == "__main__":
    record(pathlib.Path(sys.argv.pop(1)))
    flag_source.read("grpo.train").define()
    cli.run(train.main)

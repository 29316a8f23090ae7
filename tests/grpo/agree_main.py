"""A process of two that compares what it has with the other one, in several ways, one after the
other.

    python -m tests.grpo.agree_main FOLDER COORDINATOR PROCESS

Prints what each comparison says. The last one ends both processes.
"""

import pathlib
import sys

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from configs import tiny_ocr
from grpo.data.prompts import PromptSet
from grpo.settings import agreement
from wan_jax.command_line.cli import UserError
from wan_jax.distributed import launchers, multihost, replicas
from wan_jax.storage import folder_lock


def compare(folder: pathlib.Path, process: int) -> None:
    prompts = PromptSet(("a", "b"), (("a",), ("b",)))

    def check(change=lambda c: None, prompts=prompts):
        """With a change of the recipe or the prompts in process 1."""
        c = tiny_ocr.get_config()
        c.run_dir, c.model.path = str(folder / "run"), str(folder / "model")
        if process == 1:
            change(c)
        agreement.check(c, {"prompts.train": prompts})

    def said(call, *args) -> None:
        try:
            call(*args)
            print("ok", flush=True)
        except UserError as error:
            print(error, flush=True)

    said(check)
    said(check, lambda c: c.update(run_dir=str(folder)))
    said(check, lambda c: c.model.update(path=str(folder)))
    said(check, lambda c: c.train.update(learning_rate=0.5))
    said(check, lambda c: c.reward.update(workers=7))
    # a replica in each process
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, -1), ("data", "fsdp"))
    for wrong in (0, 1):
        value = np.arange(8, dtype=np.float32) + wrong * process
        said(
            replicas.check_same,
            {
                "a": jax.make_array_from_callback(
                    (8,), NamedSharding(mesh, P("fsdp")), lambda index, value=value: value[index]
                )
            },
            "weights",
        )
    check(prompts=PromptSet(prompts.prompts[::-1] if process else prompts.prompts, prompts.targets))


def main(argv):
    folder, process = pathlib.Path(argv[1]), int(argv[3])
    multihost.FOLDER_SECONDS = 1
    with multihost.joined(launchers.Launch(argv[2], 2, process), timeout=10, join_timeout=100):
        if multihost.first():
            with folder_lock.locked(folder / "run", "--config.run_dir"):
                compare(folder, process)
        else:
            compare(folder, process)


if __name__ == "__main__":
    main(sys.argv)

"""Checkpoints of a training run (orbax): what the trainer saves and resumes from, and what sampling and export read.

    RUN/checkpoints/<epoch>/state/   trainable, ema and optimiser leaves (flat dicts of arrays)
    RUN/checkpoints/<epoch>/meta/    JSON: epoch, model folder, trained experts, LoRA settings or null, the config
    RUN/checkpoints/<epoch>/trained/ the weights to sample with (EMA), flat dict

Orbax writes a step to a temporary name and renames it when every file is on disk, so a run killed in the middle of
a save finds the previous checkpoint.
"""

import pathlib

import jax
import numpy as np
import orbax.checkpoint as ocp

from wan_jax.cli import UserError, check_space
from wan_jax.lora import LoRAConfig

FORMAT = 1


class Checkpoints:
    """The checkpoints of one run folder. `keep` is how many of the newest stay (None: all)."""

    def __init__(self, folder, keep: int | None = None, read_only: bool = False):
        self.folder = pathlib.Path(folder).absolute() / "checkpoints"
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=not read_only, read_only=read_only,
                                               enable_async_checkpointing=False, step_prefix=None)
        self.manager = ocp.CheckpointManager(self.folder, options=options)

    def latest(self) -> int | None:
        """The newest finished checkpoint's epoch, or None."""
        return self.manager.latest_step()

    def save(self, epoch: int, state: dict, trained: dict, meta: dict):
        """state: {'trainable' | 'ema' | 'opt': {name: array}}; trained: {path: array}; meta: JSON values.

        Raises `UserError` when the disk has no room for it.
        """
        check_space(self.folder, sum(x.nbytes for x in jax.tree.leaves((state, trained))), "the checkpoint")
        self.manager.save(epoch, args=ocp.args.Composite(
            state=ocp.args.StandardSave(state), trained=ocp.args.StandardSave(trained),
            meta=ocp.args.JsonSave(dict(meta, format=FORMAT, epoch=epoch))))
        self.manager.wait_until_finished()

    def restore_state(self, epoch: int, like: dict) -> dict:
        """The state of `save`, onto the shapes, dtypes and shardings of `like`."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        return self.manager.restore(epoch, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))["state"]

    def meta(self, epoch: int) -> dict:
        return self.manager.restore(epoch, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]

    def path(self, epoch: int) -> pathlib.Path:
        return self.folder / str(epoch)

    def close(self):
        self.manager.close()


def join_experts(trees: dict[str, dict]) -> dict:
    """{expert: {path: array}} to the one flat dict that is stored: bare paths for a model's only transformer, and
    '<expert>/<path>' where there is a `transformer_2`."""
    if set(trees) == {"transformer"}:
        return dict(trees["transformer"])
    return {f"{name}/{path}": leaf for name, tree in trees.items() for path, leaf in tree.items()}


def split_experts(flat: dict, experts: list[str]) -> dict[str, dict]:
    """The inverse of `join_experts`. experts: the trained ones, as the checkpoint's meta names them."""
    if experts == ["transformer"]:
        return {"transformer": dict(flat)}
    return {name: {k.removeprefix(name + "/"): v for k, v in flat.items() if k.startswith(name + "/")}
            for name in experts}


def read_numpy(path) -> dict:
    """The tree of NumPy arrays in an orbax folder, whichever devices it was written from."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        tree = checkpointer.metadata(path).item_metadata.tree
        plain = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=plain))


def load_trained(path) -> tuple[LoRAConfig | None, dict[str, dict[str, np.ndarray]], dict]:
    """The weights to sample with, from a run folder (its newest checkpoint) or one `checkpoints/<epoch>` folder.

    Returns (LoRA settings, or None after full fine-tuning; {expert: {path: float32 array}} of the trained experts; the
    checkpoint's meta). Raises `UserError` when there is no finished checkpoint.
    """
    path = pathlib.Path(path).absolute()
    if not path.is_dir():
        raise UserError(f"{path} does not exist: give a run folder of grpo.train or one of its checkpoints/<epoch>")
    run, epoch = (path.parent.parent, int(path.name)) if path.name.isdigit() and path.parent.name == "checkpoints" \
        else (path, None)
    if not (run / "checkpoints").is_dir():
        raise UserError(f"{path} holds no checkpoints folder: give a run folder of grpo.train")
    checkpoints = Checkpoints(run, read_only=True)
    try:
        epoch = checkpoints.latest() if epoch is None else epoch
        if epoch is None or epoch not in checkpoints.manager.all_steps():
            raise UserError(f"{path} holds no such checkpoint (it has {sorted(checkpoints.manager.all_steps())})")
        meta = checkpoints.meta(epoch)
        trained = read_numpy(checkpoints.path(epoch) / "trained")
    finally:
        checkpoints.close()
    lora = meta["lora"] and LoRAConfig(rank=meta["lora"]["rank"], alpha=meta["lora"]["alpha"],
                                       targets=tuple(meta["lora"]["targets"]))
    return lora, split_experts(trained, meta["experts"]), meta

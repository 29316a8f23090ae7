"""Checkpoints of a training run: what the trainer saves and resumes from, and what sampling and
export read.

    RUN/checkpoints/<epoch>/state/        orbax: trainable, optimiser and counter leaves (flat dicts
                                          of arrays)
    RUN/checkpoints/<epoch>/trained/      orbax: the weights to sample with, which are the moving
                                          average; a flat dict
    RUN/checkpoints/<epoch>/meta/metadata JSON: epoch, model, trained experts, LoRA settings or
    null, the config, and
                                          the digests of the model and of the training prompts
    RUN/checkpoints/<epoch>/digests.json  size and digest of every other file
    (`wan_jax.storage.integrity`)

A checkpoint is written under a temporary name, which is changed when every file is on disk, the
digests last. So a run that is killed during a save finds the previous checkpoint, and a numbered
folder without digests was copied in part.

Format 1 had no digests, and the moving average in state/ too. It is still read.
"""

import contextlib
import gc
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Iterator

import jax
import numpy as np
import orbax.checkpoint as ocp

from wan_jax.command_line.cli import UserError, check_space
from wan_jax.distributed import multihost
from wan_jax.models.lora import LoRAConfig
from wan_jax.storage import integrity
from wan_jax.storage.paths import expand

FORMAT = 2
DIGESTS, META = "digests.json", "meta/metadata"
ITEMS = ("meta", "state", "trained")
# of every meta
FIELDS = {"epoch": int, "model": str, "experts": list, "lora": (dict, type(None)), "config": dict}
LORA_FIELDS = {"rank": int, "alpha": (int, float), "targets": list}


class Checkpoints:
    """The checkpoints of one run folder. `keep` is how many of the newest stay (None: all)."""

    def __init__(self, folder, keep: int | None = None):
        self.folder = pathlib.Path(folder).absolute() / "checkpoints"
        self.keep = keep

    def epochs(self) -> list[int]:
        """The epochs that have a folder, complete or not, in ascending order."""
        if not self.folder.is_dir():
            return []
        return sorted(
            int(path.name)
            for path in self.folder.iterdir()
            if path.name.isdecimal() and str(int(path.name)) == path.name
        )

    def begin(self) -> int | None:
        """Create the folder, and return the epoch to continue from. Raises `UserError`."""
        if self.folder.is_file():
            raise UserError(
                f"{self.folder} is a file where a folder is needed; remove it or choose another "
                "--config.run_dir"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.latest()

    def latest(self) -> int | None:
        """The newest checkpoint's epoch, or None. Raises `UserError` when its folder is not a
        complete checkpoint.
        """
        epochs = self.epochs()
        if epochs:
            self.meta(epochs[-1])
        return epochs[-1] if epochs else None

    def save(self, epoch: int, state: dict, trained: dict, meta: dict):
        """state: {'trainable' | 'opt' | ...: {name: array}}; trained: {path: array}; meta: JSON
        values.

        All processes call it together. Raises `UserError` when the disk has no room for it.
        """
        check_space(
            self.folder, sum(x.nbytes for x in jax.tree.leaves((state, trained))), "the checkpoint"
        )
        temporary = self.folder / f".{epoch}.tmp"
        multihost.from_first(self._remove_unfinished)
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            for name, tree in (("state", state), ("trained", trained)):
                checkpointer.save(temporary / name, args=ocp.args.StandardSave(tree))
        multihost.from_first(
            lambda: self._finish(temporary, epoch, dict(meta, format=FORMAT, epoch=epoch))
        )

    def _remove_unfinished(self) -> None:
        """What a killed process left, also one of format 1."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in [*self.folder.glob(".*.tmp"), *self.folder.glob("*.orbax-checkpoint-tmp*")]:
            shutil.rmtree(path)

    def _finish(self, temporary: pathlib.Path, epoch: int, meta: dict) -> None:
        # orbax makes a folder that was moved away anew, without what it held
        for name in ("state", "trained"):
            os.stat(temporary / name)
        (temporary / META).parent.mkdir()
        (temporary / META).write_text(json.dumps(meta))
        integrity.write_manifest(temporary / DIGESTS, {}, integrity.measure(temporary, flush=True))
        temporary.rename(self.path(epoch))
        _flush_folder(self.folder)
        for old in self.epochs()[: -self.keep] if self.keep else ():
            # at no time is there a numbered folder that lacks files
            self.path(old).rename(temporary)
            shutil.rmtree(temporary)

    def check(self, epoch: int, items: tuple[str, ...] = ITEMS) -> dict:
        """Read every file of these items and compare it with its digest; return the checkpoint's
        meta.

        All processes call it together, and each reads its share of the files. Raises `UserError`
        that names the damaged file and a checkpoint that is whole.
        """
        meta, files = self.meta(epoch), self._digests(epoch)
        if files is None:
            if multihost.first():
                print(
                    f"{self.path(epoch)} was saved by an earlier version, without digests: damage "
                    "to its files cannot be seen; later checkpoints have them",
                    flush=True,
                )
            return meta
        names = sorted(name for name in files if name.split("/")[0] in items)
        mine = {name: files[name] for name in names[jax.process_index() :: jax.process_count()]}
        found = multihost.gather(integrity.problem(self.path(epoch), mine))
        if first := next(filter(None, found), None):
            raise self._damaged(epoch, first)
        return meta

    def meta(self, epoch: int) -> dict:
        """Raises `UserError` when the folder is not a complete checkpoint."""
        try:
            files = self._digests(epoch)
            if files is not None and (
                problem := integrity.problem(self.path(epoch), {META: files[META]})
            ):
                raise integrity.Damaged(problem)
            return self._read_meta(epoch)
        except integrity.Damaged as error:
            raise self._damaged(epoch, str(error)) from None

    def restore_state(self, epoch: int, like: dict) -> tuple[dict, dict]:
        """(state, trained) of `save`, onto the shapes, dtypes and shardings of `like`, a state with
        a part 'ema' for the trained weights.
        """
        averaged_too = self.meta(epoch)["format"] == 1
        state = (
            like if averaged_too else {key: value for key, value in like.items() if key != "ema"}
        )
        return self._restore(epoch, "state", state), self._restore(epoch, "trained", like["ema"])

    def _restore(self, epoch: int, item: str, like: dict) -> dict:
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        with (
            self._readable(epoch, item),
            ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer,
        ):
            return checkpointer.restore(
                self.path(epoch) / item, args=ocp.args.StandardRestore(abstract)
            )

    def load_trained(self, epoch: int) -> dict[str, np.ndarray]:
        """The weights of `save` as NumPy arrays."""
        with self._readable(epoch, "trained"):
            return read_numpy(self.path(epoch) / "trained")

    def path(self, epoch: int) -> pathlib.Path:
        return self.folder / str(epoch)

    def _digests(self, epoch: int) -> integrity.Files | None:
        """None for format 1. Raises `Damaged`."""
        path = self.path(epoch)
        if not (path / DIGESTS).exists():
            if path.is_dir() and (path / META).is_file() and self._read_meta(epoch)["format"] == 1:
                if missing := [name for name in ("state", "trained") if not (path / name).is_dir()]:
                    raise integrity.Damaged(f"{missing[0]} is missing")
                return None
            raise integrity.Damaged(
                f"{META if not (path / META).exists() else DIGESTS} is missing: the folder was "
                "not copied whole, or is no checkpoint"
            )
        files = integrity.read_manifest(path / DIGESTS).get("files", {})
        if META not in files:
            raise integrity.Damaged(f"{DIGESTS} names no {META}")
        return files

    def _read_meta(self, epoch: int) -> dict:
        path = self.path(epoch) / META
        meta = integrity.read_json(path)
        if meta.get("format") not in (1, FORMAT):
            raise integrity.Damaged(
                f"{META} has format {meta.get('format')}, this version reads 1 and {FORMAT}"
            )
        for fields, values in ((FIELDS, meta), (LORA_FIELDS, meta.get("lora"))):
            for name, kind in fields.items() if values is not None else ():
                if not isinstance(values.get(name, ...), kind):
                    raise integrity.Damaged(f"{META} has no valid {name!r}")
        return meta

    @contextlib.contextmanager
    def _readable(self, epoch: int, item: str) -> Iterator[None]:
        """Turn whatever orbax raises on a damaged checkpoint (many types, `Exception` itself among
        them) into one message, and keep Python from printing the errors of arrays that orbax did
        not wait for.
        """
        hook, message = sys.unraisablehook, None
        sys.unraisablehook = lambda _: None
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # the message keeps what the error says
            message = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        finally:
            if message:
                gc.collect()  # with the hook above, the errors that nobody waited for
            sys.unraisablehook = hook
        if message:
            raise self._damaged(
                epoch,
                f"{item} cannot be read, or does not fit the settings and the model ({message})",
            )

    def _damaged(self, epoch: int, what: str) -> UserError:
        path = self.path(epoch)
        what = what.replace(f"{path}/", "")
        # earlier ones first
        others = sorted((e for e in self.epochs() if e != epoch), key=lambda e: (e > epoch, -e))
        whole = next(filter(self._is_whole, others), None)
        if whole is None:
            return UserError(
                f"{path} is damaged: {what}; no other checkpoint of the run is whole: copy this "
                "one again from where it is whole, or start a new run with another "
                "--config.run_dir"
            )
        newer = " and ".join(str(self.path(e)) for e in self.epochs() if e > whole)
        seen = (
            "is whole"
            if self._digests(whole)
            else "has all its parts (and no digests to check them by)"
        )
        return UserError(
            f"{path} is damaged: {what}; {self.path(whole)} {seen}: "
            + (f"remove {newer} to continue from {whole}, or " if newer else "")
            + f"give --checkpoint={self.path(whole)}"
        )

    def _is_whole(self, epoch: int) -> bool:
        try:
            files = self._digests(epoch)
        except integrity.Damaged:
            return False
        return files is None or integrity.problem(self.path(epoch), files) is None


def _flush_folder(path: pathlib.Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def join_experts(trees: dict[str, dict]) -> dict:
    """{expert: {path: array}} to the one flat dict that is stored: bare paths for a model's only
    transformer, and '<expert>/<path>' where there is a `transformer_2`.
    """
    if set(trees) == {"transformer"}:
        return dict(trees["transformer"])
    return {f"{name}/{path}": leaf for name, tree in trees.items() for path, leaf in tree.items()}


def split_experts(flat: dict, experts: list[str]) -> dict[str, dict]:
    """The inverse of `join_experts`. experts: the trained ones, as the checkpoint's meta names
    them.
    """
    if experts == ["transformer"]:
        return {"transformer": dict(flat)}
    return {
        name: {k.removeprefix(name + "/"): v for k, v in flat.items() if k.startswith(name + "/")}
        for name in experts
    }


def read_numpy(path) -> dict:
    """The tree of NumPy arrays in an orbax folder, whichever devices it was written from."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        tree = checkpointer.metadata(path).item_metadata.tree
        plain = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=plain))


def find(path) -> tuple[Checkpoints, int]:
    """A checkpoint by its run folder (the newest one) or its own folder `checkpoints/<epoch>`.

    Raises `UserError` when there is none.
    """
    path = expand(path)
    if not path.is_dir():
        raise UserError(
            f"{path} does not exist: give a run folder of grpo.train or one of its "
            "checkpoints/<epoch>"
        )
    run, epoch = (
        (path.parent.parent, int(path.name))
        if path.name.isdecimal() and path.parent.name == "checkpoints"
        else (path, None)
    )
    if not (run / "checkpoints").is_dir():
        raise UserError(f"{path} holds no checkpoints folder: give a run folder of grpo.train")
    checkpoints = Checkpoints(run)
    epoch = checkpoints.latest() if epoch is None else epoch
    if epoch not in checkpoints.epochs():
        raise UserError(f"{path} holds no such checkpoint (it has {checkpoints.epochs()})")
    return checkpoints, epoch


def load_trained(path) -> tuple[LoRAConfig | None, dict[str, dict[str, np.ndarray]], dict]:
    """The weights to sample with, from a run folder (its newest checkpoint) or one
    `checkpoints/<epoch>` folder.

    Returns (LoRA settings, or None after full fine-tuning; {expert: {path: float32 array}} of the
    trained experts; the checkpoint's meta). Raises `UserError` when there is no finished
    checkpoint, or when it is damaged.
    """
    checkpoints, epoch = find(path)
    meta = checkpoints.check(epoch, ("meta", "trained"))
    trained = checkpoints.load_trained(epoch)
    lora = meta["lora"] and LoRAConfig(
        rank=meta["lora"]["rank"],
        alpha=meta["lora"]["alpha"],
        targets=tuple(meta["lora"]["targets"]),
    )
    return lora, split_experts(trained, meta["experts"]), meta

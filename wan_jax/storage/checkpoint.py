"""Checkpoints of a training run: saving, resuming and checking them.

    RUN/checkpoints/<epoch>/state/         orbax: flat dicts of trainable arrays, optimiser state
                                           and counters
    RUN/checkpoints/<epoch>/trained/       orbax: flat dict of the weights to sample with, which are
                                           the moving average; in a run without one
                                           the trained arrays, which state/ leaves out
    RUN/checkpoints/<epoch>/meta/metadata  JSON: epoch, model, trained experts, LoRA settings or
                                           null, the config, digests of the model and of the prompts
    RUN/checkpoints/<epoch>/digests.json   size and digest of every other file (`integrity`)
    RUN/best.json                          JSON: the epoch of the best checkpoint, and why it is best

A checkpoint is written under a temporary name and renamed when every file is on disk, the digests
last. So a run that is killed while it saves still finds the previous checkpoint, and a numbered
folder without digests was copied in part.

Format 1 had no digests, and also had the moving average in state/. It can still be read.

`wan_jax.storage.trained_weights` reads the weights to sample with.
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

from wan_jax.command_line.cli import check_space
from wan_jax.distributed import multihost
from wan_jax.errors import UserError
from wan_jax.storage import integrity
from wan_jax.storage.paths import expand

FORMAT = 2
DIGESTS, META, BEST = "digests.json", "meta/metadata", "best.json"
ITEMS = ("meta", "state", "trained")
# Parts of state/ that earlier versions stored beside the same weights in trained/: the moving average
# in format 1, the trained weights of runs without an average.
REPEATED = {"ema", "trainable"}
# Fields of every meta, and their types.
FIELDS = {"epoch": int, "model": str, "experts": list, "lora": (dict, type(None)), "config": dict}
LORA_FIELDS = {"rank": int, "alpha": (int, float), "targets": list}


class Checkpoints:
    """The checkpoints of one run folder.

    keep: number of newest checkpoints to keep; None keeps all.
    """

    def __init__(self, folder, keep: int | None = None):
        self.folder = pathlib.Path(folder).absolute() / "checkpoints"
        self.keep = keep

    def epochs(self) -> list[int]:
        """Return the epochs that have a folder, complete or not, in ascending order."""
        if not self.folder.is_dir():
            return []
        return sorted(
            int(path.name)
            for path in self.folder.iterdir()
            if path.name.isdecimal() and str(int(path.name)) == path.name
        )

    def begin(self) -> int | None:
        """Create the folder and return the epoch to continue from, None for a new run. Raises
        `UserError`.
        """
        if self.folder.is_file():
            raise UserError(
                f"{self.folder} is a file where a folder is needed; remove it or choose another "
                "--config.run_dir"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.latest()

    def latest(self) -> int | None:
        """Return the epoch of the newest checkpoint, or None. Raises `UserError` when it is not
        complete.
        """
        epochs = self.epochs()
        if epochs:
            self.meta(epochs[-1])
        return epochs[-1] if epochs else None

    def save(self, epoch: int, state: dict, trained: dict, meta: dict):
        """Write the checkpoint of an epoch. All processes call this together.

        Args:
            epoch: the number of its folder.
            state: {'trainable' | 'opt' | ...: {name: array}}.
            trained: the weights to sample with, {path: array}.
            meta: JSON values.

        Raises `UserError` when the disk does not have enough space.
        """
        self.check_space((state, trained), "the checkpoint")
        temporary = self.folder / f".{epoch}.tmp"
        multihost.from_first(self._remove_unfinished)
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            for name, tree in (("state", state), ("trained", trained)):
                checkpointer.save(temporary / name, args=ocp.args.StandardSave(tree))
        multihost.from_first(
            lambda: self._finish(temporary, epoch, dict(meta, format=FORMAT, epoch=epoch))
        )

    def check_space(self, tree, what: str) -> None:
        """Raise `UserError` where the disk does not have the space of a tree's arrays. what: its name."""
        check_space(self.folder, sum(x.nbytes for x in jax.tree.leaves(tree)), what)

    def _remove_unfinished(self) -> None:
        """Remove what a killed process left, also in format 1."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in [*self.folder.glob(".*.tmp"), *self.folder.glob("*.orbax-checkpoint-tmp*")]:
            shutil.rmtree(path)

    def _finish(self, temporary: pathlib.Path, epoch: int, meta: dict) -> None:
        """Write meta and digests, rename the folder, and remove the oldest checkpoints."""
        # if the folder was moved away, orbax has created a new one without its earlier content
        for name in ("state", "trained"):
            os.stat(temporary / name)
        (temporary / META).parent.mkdir()
        (temporary / META).write_text(json.dumps(meta))
        integrity.write_manifest(temporary / DIGESTS, {}, integrity.measure(temporary, flush=True))
        temporary.rename(self.path(epoch))
        _flush_folder(self.folder)
        kept = self.best()
        for old in self.epochs()[: -self.keep] if self.keep else ():
            if old == kept:
                continue
            # renamed first, so that a numbered folder never lacks files
            self.path(old).rename(temporary)
            shutil.rmtree(temporary)

    def best(self) -> int | None:
        """Return the epoch of the best checkpoint, None where none is marked or it is not there."""
        try:
            epoch = json.loads((self.folder.parent / BEST).read_text())["epoch"]
        except (OSError, ValueError, LookupError, TypeError):
            return None
        return epoch if epoch in self.epochs() else None

    def mark_best(self, epoch: int, why: str) -> None:
        """Mark a checkpoint as the best one, which is then kept. why: for its reader."""
        path = self.folder.parent / BEST
        temporary = path.with_name(f".{BEST}.part")
        temporary.write_text(json.dumps({"epoch": epoch, "why": why}, indent=2) + "\n")
        temporary.replace(path)

    def check(self, epoch: int, items: tuple[str, ...] = ITEMS) -> dict:
        """Read every file of these items, compare it with its digest, and return the meta.

        All processes call this together, and each reads its share of the files. Raises `UserError`
        that names the damaged file and a checkpoint that is complete.
        """
        meta = self.meta(epoch)
        files = self._digests(epoch)
        if files is None:
            if multihost.first():
                print(
                    f"{self.path(epoch)} was saved by an earlier version, without digests: damage "
                    "to its files cannot be seen; later checkpoints have them",
                    flush=True,
                )
            return meta
        names = sorted(name for name in files if name.split("/")[0] in items)
        share = {name: files[name] for name in names[jax.process_index() :: jax.process_count()]}
        problems = multihost.gather(integrity.problem(self.path(epoch), share))
        if first := next(filter(None, problems), None):
            raise self._damaged(epoch, first)
        return meta

    def meta(self, epoch: int) -> dict:
        """Return the meta. Raises `UserError` when the folder is not a complete checkpoint."""
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
        """Return (state, trained) as given to `save`.

        like: arrays with the shapes, dtypes and shardings to restore to, as `state` and with a part
        'ema' for the trained weights.
        """
        state = {key: value for key, value in like.items() if key != "ema"}
        more = dict.fromkeys(self._parts(epoch, "state") & REPEATED - set(state), like["ema"])
        restored = self._restore(epoch, "state", state | more)
        trained = self._restore(epoch, "trained", like["ema"])
        return {key: restored[key] for key in state}, trained

    def _parts(self, epoch: int, item: str) -> set[str]:
        """Return the names of the parts of an item."""
        with (
            self._readable(epoch, item),
            ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer,
        ):
            return set(checkpointer.metadata(self.path(epoch) / item).item_metadata.tree)

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
        """Return the trained weights as NumPy arrays."""
        with self._readable(epoch, "trained"):
            return read_numpy(self.path(epoch) / "trained")

    def path(self, epoch: int) -> pathlib.Path:
        """Return the folder of an epoch."""
        return self.folder / str(epoch)

    def _digests(self, epoch: int) -> integrity.Files | None:
        """Return the digests of the files, None in format 1. Raises `Damaged`."""
        path = self.path(epoch)
        if not (path / DIGESTS).exists():
            if path.is_dir() and (path / META).is_file() and self._read_meta(epoch)["format"] == 1:
                if missing := [name for name in ("state", "trained") if not (path / name).is_dir()]:
                    raise integrity.Damaged(f"{missing[0]} is missing")
                return None
            raise integrity.Damaged(
                f"{META if not (path / META).exists() else DIGESTS} is missing: the folder was "
                "not copied completely, or is not a checkpoint"
            )
        files = integrity.read_manifest(path / DIGESTS).get("files", {})
        if META not in files:
            raise integrity.Damaged(f"{DIGESTS} names no {META}")
        return files

    def _read_meta(self, epoch: int) -> dict:
        """Return the meta without comparing its digest. Raises `Damaged`."""
        path = self.path(epoch) / META
        meta = integrity.read_json(path)
        if meta.get("format") not in (1, FORMAT):
            raise integrity.Damaged(
                f"{META} has format {meta.get('format')}, this version reads 1 and {FORMAT}"
            )
        for fields, values in ((FIELDS, meta), (LORA_FIELDS, meta.get("lora"))):
            if values is None:
                continue
            for name, kind in fields.items():
                if not isinstance(values.get(name, ...), kind):
                    raise integrity.Damaged(f"{META} has no valid {name!r}")
        return meta

    @contextlib.contextmanager
    def _readable(self, epoch: int, item: str) -> Iterator[None]:
        """Convert any error that orbax raises on a damaged checkpoint into one `UserError`.

        Orbax raises many types, `Exception` itself among them. Errors of arrays that orbax did not
        wait for would be printed by Python's hook for unraisable errors, which is replaced
        meanwhile.
        """
        hook = sys.unraisablehook
        message = None
        sys.unraisablehook = lambda _: None
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # broad, see above; the text of the error is kept
            message = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        finally:
            if message:
                gc.collect()  # reports the remaining errors now, to the replaced hook
            sys.unraisablehook = hook
        if message:
            raise self._damaged(
                epoch,
                f"{item} cannot be read, or does not fit the settings and the model ({message})",
            )

    def _damaged(self, epoch: int, what: str) -> UserError:
        """Return the error for a damaged checkpoint, which names one that is complete."""
        path = self.path(epoch)
        what = what.replace(f"{path}/", "")
        # the nearest earlier one first, then later ones
        others = sorted((e for e in self.epochs() if e != epoch), key=lambda e: (e > epoch, -e))
        whole = next(filter(self._is_whole, others), None)
        if whole is None:
            return UserError(
                f"{path} is damaged: {what}; no other checkpoint of the run is whole: copy this "
                "one again from where it is whole, or start a new run with another "
                "--config.run_dir"
            )
        newer = " and ".join(str(self.path(e)) for e in self.epochs() if e > whole)
        state = (
            "is whole"
            if self._digests(whole)
            else "has all its files (and no digests to check them)"
        )
        return UserError(
            f"{path} is damaged: {what}; {self.path(whole)} {state}: "
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
    """Join {expert: {path: array}} to the flat dict that is stored: plain paths if the model has
    one transformer, and '<expert>/<path>' if it has a `transformer_2`.
    """
    if set(trees) == {"transformer"}:
        return dict(trees["transformer"])
    return {f"{name}/{path}": leaf for name, tree in trees.items() for path, leaf in tree.items()}


def split_experts(flat: dict, experts: list[str]) -> dict[str, dict]:
    """The inverse of `join_experts`.

    experts: names of the trained experts, as in the meta of the checkpoint.
    """
    if experts == ["transformer"]:
        return {"transformer": dict(flat)}
    return {
        name: {k.removeprefix(name + "/"): v for k, v in flat.items() if k.startswith(name + "/")}
        for name in experts
    }


def read_numpy(path) -> dict:
    """Read the tree of an orbax folder as NumPy arrays, whichever devices it was written from."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        tree = checkpointer.metadata(path).item_metadata.tree
        plain = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=plain))


def find(path) -> tuple[Checkpoints, int]:
    """Return a checkpoint and its epoch, from a run folder (its newest checkpoint), from
    `<run folder>/best` or from a folder `checkpoints/<epoch>`. Raises `UserError` when there is none.
    """
    path = expand(path)
    if path.name == "best" and not path.exists() and path.parent.is_dir():
        checkpoints = Checkpoints(path.parent)
        best = checkpoints.best()
        if best is None:
            raise UserError(
                f"{path}: {path.parent / BEST} names no checkpoint that is there (there are "
                f"{checkpoints.epochs()}); a run with --config.save.best=True writes it when it "
                "evaluates"
            )
        return checkpoints, best
    if not path.is_dir():
        raise UserError(
            f"{path} does not exist: give a run folder of grpo.train, RUN/best or "
            "RUN/checkpoints/<epoch>"
        )
    run, epoch = (
        (path.parent.parent, int(path.name))
        if path.name.isdecimal() and path.parent.name == "checkpoints"
        else (path, None)
    )
    if not (run / "checkpoints").is_dir():
        raise UserError(f"{path} has no checkpoints folder: give a run folder of grpo.train")
    checkpoints = Checkpoints(run)
    epoch = checkpoints.latest() if epoch is None else epoch
    if epoch not in checkpoints.epochs():
        raise UserError(f"{path} has no such checkpoint (it has {checkpoints.epochs()})")
    return checkpoints, epoch

"""Writes a converted model back in Diffusers layout, with a run's trained weights merged in if
given.

    python -m convert.to_diffusers --src models/wan-1.3b --dst exported [--checkpoint runs/my_run]
    [--dtype bfloat16]

The inverse of `convert.from_diffusers`, by the same key table: without a checkpoint and with the
default --dtype every tensor comes back bit for bit, with one file's tensors in memory at a time
(and a run's trained weights, which are read whole). Trained weights are merged in float32 and
rounded once to the type written; what rounding loses of them is printed. Diffusers'
`WanPipeline.from_pretrained` loads the result.
"""

import json
import math
import pathlib
import shutil
import time
from collections.abc import Callable, Mapping

import ml_dtypes
import numpy as np
from absl import flags
from safetensors.numpy import save_file

from convert import key_table
from convert.folders import whole_folder
from convert.plan import STEMS, contiguous, rounded
from convert.source import check_destination, copied_files
from wan_jax.command_line import cli
from wan_jax.errors import UserError
from wan_jax.models.lora import LoRAConfig
from wan_jax.storage import model_dir
from wan_jax.storage.array_store import ArrayStore
from wan_jax.storage.paths import check_apart, expand
from wan_jax.storage.trained_weights import load_trained

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
# (path, layer or None) to one layer of an array, or all of it
Read = Callable[[str, int | None], np.ndarray]
# {path: (base array, index of the layer) to fp32}
Changes = Mapping[str, Callable[[np.ndarray, object], np.ndarray]]


def merge_lora(
    shapes: Mapping[str, tuple[int, ...]], adapters: dict[str, np.ndarray], scale: float
) -> Changes:
    """Return kernel + scale * A B, in float32, for every adapted kernel.

    shapes: {'.../kernel': [L, in, out], ...}; adapters: {'.../lora_a': [L, in, r], '.../lora_b':
    [L, r, out]}. Raises `UserError` when an adapter has no layer, or no partner.
    """
    changes = {}
    for layer in sorted({path.rsplit("/", 1)[0] for path in adapters}):
        a, b = (adapters.get(f"{layer}/{name}") for name in ("lora_a", "lora_b"))
        *stack, n_in, n_out = shapes.get(f"{layer}/kernel", (0, 0))
        if (
            a is None
            or b is None
            or [a.shape, b.shape] != [(*stack, n_in, a.shape[-1]), (*stack, a.shape[-1], n_out)]
        ):
            raise UserError(
                f"the checkpoint's adapter of {layer} does not fit this model: it was trained from "
                "another one"
            )
        changes[f"{layer}/kernel"] = lambda base, at, a=a, b=b: (
            base.astype(np.float32) + scale * (a[at] @ b[at])
        )
    return changes


def trained_changes(
    store: ArrayStore, lora: LoRAConfig | None, trained: dict[str, np.ndarray]
) -> Changes:
    """Return what a run changed of a component: adapters merged into the kernels, or all its
    weights; {}: nothing.
    """
    if lora is not None:
        return merge_lora(store.shapes, trained, lora.scale)
    if trained and store.shapes != {k: v.shape for k, v in trained.items()}:
        raise UserError("the checkpoint does not fit this model: it was trained from another one")
    return {path: lambda base, at, value=value: value[at] for path, value in trained.items()}


class Merged:
    """The base weights with a run's changes, computed in float32 and rounded once to the type to
    write.

    Counts how much of the changes rounding loses: the rounded base with the changes is compared
    with the rounded base.
    """

    def __init__(self, base: Read, changes: Changes, dtypes: Mapping[str, np.dtype]):
        self.base, self.changes, self.dtypes = base, changes, dtypes
        self.changed = self.missed = 0.0  # squared norms
        self.rounds = any(dtypes[path] != np.float32 for path in changes)

    @property
    def lost(self) -> float:
        """Relative norm of what rounding lost of the changes so far."""
        return math.sqrt(self.missed / self.changed) if self.changed else 0.0

    def read(self, path: str, layer: int | None) -> np.ndarray:
        base, dtype = self.base(path, layer), self.dtypes[path]
        name = path if layer is None else f"{path}[{layer}]"
        written = rounded(base, dtype, name)
        if path not in self.changes:
            return written
        merged = self.changes[path](base, ... if layer is None else layer)
        result = rounded(merged, dtype, name)
        if dtype != np.float32:
            change = merged - base.astype(np.float32)
            missed = change - (result.astype(np.float32) - written.astype(np.float32))
            self.changed += float(np.vdot(change, change))
            self.missed += float(np.vdot(missed, missed))
        return result


def write_tensors(
    folder: pathlib.Path,
    stem: str,
    table: list[key_table.Entry],
    dtypes: dict[str, np.dtype],
    read: Read,
    shard_bytes: int,
    metadata: Mapping[str, str],
) -> None:
    """One safetensors file, or several of at most `shard_bytes` with an index, as Diffusers names
    them.

    dtypes: {path: dtype that `read` returns}; metadata: of every file. One file's tensors are in
    memory at a time.
    """

    def size(entry):
        return math.prod(entry.shape) * dtypes[entry.path].itemsize

    shards, filled = [[]], 0
    for entry in table:
        if shards[-1] and filled + size(entry) > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += size(entry)
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        name = (
            f"{stem}.safetensors"
            if len(shards) == 1
            else f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors"
        )
        save_file(
            {e.key: contiguous(e.to_theirs(read(e.path, e.layer))) for e in shard},
            folder / name,
            metadata={"format": "pt"} | dict(metadata),
        )
        weight_map |= dict.fromkeys((entry.key for entry in shard), name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(map(size, table))}, "weight_map": weight_map}
        (folder / f"{stem}.safetensors.index.json").write_text(
            json.dumps(index, indent=2, sort_keys=True) + "\n"
        )


def export(
    src,
    dst,
    checkpoint: str | None = None,
    dtype: str = "stored",
    overwrite: bool = False,
    shard_gb: float = 5.0,
) -> None:
    """Writes the Diffusers folder `dst`. Raises `UserError`; nothing half-written is left."""
    model, dst = model_dir.open_model(src), expand(dst)
    check_destination(model.path, dst)
    lora, experts = None, {}
    if checkpoint:
        run = expand(checkpoint)
        check_apart(run if run.parent.name == "checkpoints" else run / "checkpoints", dst)
        lora, experts, meta = load_trained(checkpoint)
        model.check_same(meta.get("model_digest"), meta["model"], str(checkpoint), "--src")
    with whole_folder(dst, overwrite) as partial:
        shutil.copyfile(model.path / "model_index.json", partial / "model_index.json")
        for file in copied_files(model.path):
            target = partial / file.relative_to(model.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
        for component in model.components:
            start = time.monotonic()
            (partial / component).mkdir()
            shutil.copyfile(
                model.path / component / "config.json", partial / component / "config.json"
            )
            store = model.arrays(component)
            patch = getattr(model.config(component), "patch_size", None) or (1, 2, 2)
            table = key_table.entries(component, store.shapes, patch)
            dtypes = (
                store.dtypes if dtype == "stored" else dict.fromkeys(store.shapes, DTYPES[dtype])
            )
            merged = Merged(
                store.read, trained_changes(store, lora, experts.get(component, {})), dtypes
            )
            size = sum(math.prod(shape) * dtypes[k].itemsize for k, shape in store.shapes.items())
            cli.check_space(partial, size, f"the {component}")
            write_tensors(
                partial / component,
                STEMS[component],
                table,
                dtypes,
                merged.read,
                int(shard_gb * 1e9),
                model.metadata,
            )
            print(
                f"{component}: {len(table)} tensors, {size / 1e9:.3f} GB, "
                f"{time.monotonic() - start:.1f} s",
                flush=True,
            )
            if merged.rounds:
                print(
                    f"{component}: rounding to the type written lost {100 * merged.lost:.2g} % of "
                    "the trained change (relative norm); --dtype float32 keeps it, as does python "
                    "-m convert.export_lora",
                    flush=True,
                )
    print(
        f"{dst}: ready for WanPipeline.from_pretrained"
        + (f", with {checkpoint} merged in" if checkpoint else "")
    )


def main(_):
    FLAGS = flags.FLAGS
    export(FLAGS.src, FLAGS.dst, FLAGS.checkpoint, FLAGS.dtype, FLAGS.overwrite, FLAGS.shard_gb)


if __name__ == "__main__":
    flags.DEFINE_string("src", None, "folder written by convert.from_diffusers", required=True)
    flags.DEFINE_string("dst", None, "folder to write", required=True)
    flags.DEFINE_string(
        "checkpoint", None, "run folder of grpo.train, or one of its checkpoints/<epoch>"
    )
    flags.DEFINE_enum(
        "dtype", "stored", ["stored", *DTYPES], "type to write; stored keeps each tensor's own"
    )
    flags.DEFINE_float("shard_gb", 5.0, "largest file, GB")
    flags.DEFINE_bool("overwrite", False, "replace an existing --dst")
    cli.run(main)

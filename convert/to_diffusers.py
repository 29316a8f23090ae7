"""Writes a converted model in Diffusers layout, optionally with a run's trained weights.

    python -m convert.to_diffusers --src models/wan2.1-1.3b --dst exported
    python -m convert.to_diffusers --src ... --dst ... --checkpoint runs/my_run --dtype bfloat16

This is the inverse of `convert.from_diffusers` with the same key table: without a checkpoint and
with the default `--dtype` every tensor is restored bit for bit. The tensors of one file are in
memory at a time, and a run's trained weights as a whole. Trained weights are merged in float32 and
rounded once to the type written; the share lost by rounding is printed. LoRAs that the run's base
had (`config.model.loras`) are merged first and rounded as the run did, so that the trained change
is added to the weights that it was trained with. `--lora` merges others, with or without a run.
Diffusers' `WanPipeline.from_pretrained` loads the result.
"""

import json
import math
import pathlib
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from absl import flags

from convert.folders import whole_folder
from convert.plan import STEMS, contiguous, rounded
from convert.source import check_destination, copied_files
from wan_jax.command_line import cli
from wan_jax.errors import UserError
from wan_jax.models import flat_params
from wan_jax.models.lora import LoRAConfig
from wan_jax.storage import key_table, merged_loras, model_dir
from wan_jax.storage.array_store import ArrayStore
from wan_jax.storage.paths import check_apart, expand
from wan_jax.storage.tensor_files import save_tensors
from wan_jax.storage.trained_weights import load_trained
from wan_jax.storage.weight_changes import Rounding, WeightChanges

DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
# returns one layer of the array at a path, or all of it for None
Read = Callable[[str, int | None], np.ndarray]
# {path: function of the base array and the layer (... for all) that returns the new array in fp32}
Changes = Mapping[str, Callable[[np.ndarray, Any], np.ndarray]]


def merge_lora(
    shapes: Mapping[str, tuple[int, ...]], adapters: dict[str, np.ndarray], scale: float
) -> Changes:
    """Return the changes kernel + scale * A B, in float32, for every adapted kernel.

    shapes: {'.../kernel': [L, in, out], ...}. adapters: {'.../lora_a': [L, in, r], '.../lora_b':
    [L, r, out]}. Raises `UserError` when an adapter has no layer, or lacks one of its factors.
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
    """Return what a run changed of a component, or {} if nothing.

    lora: settings of the adapters, or None when all weights were trained. Raises `UserError` when
    the trained arrays do not fit the component.
    """
    if lora is not None:
        return merge_lora(store.shapes, trained, lora.scale)
    if trained and store.shapes != {k: v.shape for k, v in trained.items()}:
        raise UserError("the checkpoint does not fit this model: it was trained from another one")
    return {path: lambda base, at, value=value: value[at] for path, value in trained.items()}


def merged_base(
    model: model_dir.ModelDir, component: str, store: ArrayStore, dtypes: Mapping[str, np.dtype]
) -> tuple[Read, WeightChanges | None]:
    """Return how to read a component with the model's LoRAs, and their changes, None without any.

    dtypes: {path: type to which merged arrays are rounded}.
    """
    changes = model.changes(component) if model.changes and component in model.experts else None
    if changes is None:
        return store.read, None

    def read(path: str, layer: int | None) -> np.ndarray:
        return changes.merge(store.read(path, layer), path, layer, dtypes[path])

    return read, changes


def run_dtypes(model: model_dir.ModelDir, component: str, meta: dict) -> dict[str, np.dtype]:
    """Return the types in which a run kept the parameters of a transformer, by path."""
    dtype = jnp.dtype(meta["config"]["model"]["dtype"])
    _, like = model_dir.abstract(component, model.config(component), dtype=dtype)
    return {path: np.dtype(leaf.dtype) for path, leaf in flat_params.flatten(like).items()}


class Merged:
    """The base weights with a run's changes, computed in float32 and rounded once to `dtypes`.

    The share of the changes that rounding loses is counted: it compares the change of the rounded
    weights with the change in float32.
    """

    def __init__(self, base: Read, changes: Changes, dtypes: Mapping[str, np.dtype]):
        self.base, self.changes, self.dtypes = base, changes, dtypes
        self.rounding = Rounding()
        self.rounds = any(dtypes[path] != np.float32 for path in changes)

    @property
    def lost(self) -> float:
        """Relative norm of the part of the changes that rounding lost so far."""
        return self.rounding.lost

    def read(self, path: str, layer: int | None) -> np.ndarray:
        """Return one layer of a merged array, or all of it for None, in the type to write."""
        base, dtype = self.base(path, layer), self.dtypes[path]
        name = path if layer is None else f"{path}[{layer}]"
        written = rounded(base, dtype, name)
        if path not in self.changes:
            return written
        merged = self.changes[path](base, ... if layer is None else layer)
        result = rounded(merged, dtype, name)
        if dtype != np.float32:
            self.rounding.add(
                merged - base.astype(np.float32),
                result.astype(np.float32) - written.astype(np.float32),
            )
        return result


def write_tensors(
    folder: pathlib.Path,
    stem: str,
    table: list[key_table.Entry],
    dtypes: Mapping[str, np.dtype],
    read: Read,
    shard_bytes: int,
    metadata: Mapping[str, str],
) -> None:
    """Write one safetensors file, or several of at most `shard_bytes` with an index.

    stem: Diffusers' name of the files. dtypes: {path: dtype that `read` returns}. metadata: written
    into every file. The tensors of one file are in memory at a time.
    """

    def size(entry: key_table.Entry) -> int:
        return math.prod(entry.shape) * dtypes[entry.path].itemsize

    # Distribute the tensors over files
    shards: list[list[key_table.Entry]] = [[]]
    filled = 0
    for entry in table:
        if shards[-1] and filled + size(entry) > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += size(entry)
    # Write one file after the other, then the index
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        name = (
            f"{stem}.safetensors"
            if len(shards) == 1
            else f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors"
        )
        save_tensors(
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
    loras: Sequence[str] = (),
) -> None:
    """Write the Diffusers folder `dst` from the model folder `src`.

    checkpoint: a run folder or one of its checkpoints, whose trained weights are merged. dtype:
    'stored', 'float32' or 'bfloat16'. overwrite: replace an existing model. shard_gb: size of the
    largest file. loras: FILE[:SCALE] each, merged in addition to those that the run's base had, or
    the place where one of these is now. Raises `UserError`; `dst` is complete or does not exist.
    """
    model, dst = model_dir.open_model(src), expand(dst)
    check_destination(model.path, dst)
    lora, experts, meta = None, {}, None
    if checkpoint is not None:
        run = expand(checkpoint)
        check_apart(run if run.parent.name == "checkpoints" else run / "checkpoints", dst)
        lora, experts, meta = load_trained(checkpoint)
        model.check_same(meta.get("model_digest"), meta["model"], str(checkpoint), "--src")
    model = merged_loras.merge_with_checkpoint(model, checkpoint, loras)
    if meta is not None and lora is None:  # trained weights replace those of the base
        for name, trained in experts.items():
            changes = merged_loras.changes_of(model, merged_loras.beyond(model, meta), name)
            experts[name] = changes.applied(trained)
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
            dtypes: Mapping[str, np.dtype] = store.dtypes
            if dtype != "stored":
                dtypes = dict.fromkeys(store.shapes, DTYPES[dtype])
            kept = dtypes  # types of the base that the trained change is added to
            if meta is not None and model.changes and component in model.experts:
                kept = run_dtypes(model, component, meta)
            read, changes = merged_base(model, component, store, kept)
            merged = Merged(read, trained_changes(store, lora, experts.get(component, {})), dtypes)
            size = sum(
                math.prod(shape) * dtypes[path].itemsize for path, shape in store.shapes.items()
            )
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
            if changes is not None and (lora is not None or component not in experts):
                changes.report(component, ", ".join(map(str, model.loras)))
            if merged.rounds:
                print(
                    f"{component}: rounding to the type written lost {100 * merged.lost:.2g} % of "
                    "the trained change (relative norm); --dtype float32 keeps it, as does "
                    "python -m convert.export_lora",
                    flush=True,
                )
    print(
        f"{dst}: ready for WanPipeline.from_pretrained"
        + (f", with {checkpoint} merged in" if checkpoint else "")
        + (f", with {', '.join(map(str, model.loras))} merged in" if model.loras else "")
    )


def main(_):
    FLAGS = flags.FLAGS
    export(
        FLAGS.src,
        FLAGS.dst,
        FLAGS.checkpoint,
        FLAGS.dtype,
        FLAGS.overwrite,
        FLAGS.shard_gb,
        FLAGS.lora or (),
    )


if __name__ == "__main__":
    flags.DEFINE_string("src", None, "folder written by convert.from_diffusers", required=True)
    flags.DEFINE_string("dst", None, "folder to write", required=True)
    flags.DEFINE_string(
        "checkpoint", None, "run folder of grpo.train, RUN/best or RUN/checkpoints/EPOCH"
    )
    flags.DEFINE_enum(
        "dtype", "stored", ["stored", *DTYPES], "data type to write; stored keeps each tensor's own"
    )
    flags.DEFINE_multi_string(
        "lora",
        None,
        "LoRA file to merge, FILE[:SCALE], for two experts HIGH,LOW[:SCALE]; repeat the flag for "
        "several. LoRAs that the run's base had are merged anyway; give their present path if it "
        "has changed",
    )
    flags.DEFINE_float("shard_gb", 5.0, "size of the largest file in GB", lower_bound=0.01)
    flags.DEFINE_bool("overwrite", False, "replace an existing --dst")
    cli.run(main)

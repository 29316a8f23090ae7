"""Writes a converted model back in Diffusers layout, with a run's trained weights merged in if given.

    python -m convert.to_diffusers --src models/wan-1.3b --dst exported [--checkpoint runs/my_run] [--dtype bfloat16]

The inverse of `convert.from_diffusers`, by the same key table: without a checkpoint and with the default --dtype every
tensor comes back bit for bit. Diffusers' `WanPipeline.from_pretrained` loads the result.
"""

import json
import pathlib
import shutil
import time

import ml_dtypes
import numpy as np
from absl import flags
from safetensors.numpy import save_file

from convert import key_table
from convert.folders import whole_folder
from convert.from_diffusers import STEMS
from wan_jax import cli, model_dir
from wan_jax.checkpoint import load_trained
from wan_jax.cli import UserError

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def merge_lora(flat: dict[str, np.ndarray], adapters: dict[str, np.ndarray], scale: float) -> dict[str, np.ndarray]:
    """kernel + scale * A B for every adapted layer, computed in float32, in the kernel's own dtype.

    flat: {'.../kernel': [L, in, out], ...}; adapters: {'.../lora_a': [L, in, r], '.../lora_b': [L, r, out]}. Raises
    `UserError` when an adapter has no layer, or no partner.
    """
    layers = {path.rsplit("/", 1)[0] for path in adapters}
    merged = dict(flat)
    for layer in sorted(layers):
        a, b = (adapters.get(f"{layer}/{name}") for name in ("lora_a", "lora_b"))
        kernel = flat.get(f"{layer}/kernel")
        if a is None or b is None or kernel is None or (a @ b).shape != kernel.shape:
            raise UserError(f"the checkpoint's adapter of {layer} does not fit this model: it was trained from "
                            "another one")
        merged[f"{layer}/kernel"] = (kernel.astype(np.float32) + scale * (a @ b)).astype(kernel.dtype)
    return merged


def trained_weights(flat: dict[str, np.ndarray], checkpoint: str, expert: str) -> dict[str, np.ndarray]:
    """The base weights of `expert` with a run's trained ones merged in or put in their place, if it trained them."""
    lora, experts, _ = load_trained(checkpoint)
    if expert not in experts:
        return flat
    trained = experts[expert]
    if lora is not None:
        return merge_lora(flat, trained, lora.scale)
    if {k: v.shape for k, v in flat.items()} != {k: v.shape for k, v in trained.items()}:
        raise UserError(f"checkpoint {checkpoint} does not fit this model: it was trained from another one")
    return {k: v.astype(flat[k].dtype) for k, v in trained.items()}


def write_tensors(folder: pathlib.Path, stem: str, tensors: dict[str, np.ndarray], shard_bytes: int) -> None:
    """One safetensors file, or several of at most `shard_bytes` with an index, as Diffusers names them."""
    shards, size = [{}], 0
    for key, value in tensors.items():
        if shards[-1] and size + value.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][key] = value
        size += value.nbytes
    if len(shards) == 1:
        save_file(shards[0], folder / f"{stem}.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        name = f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
    index = {"metadata": {"total_size": sum(v.nbytes for v in tensors.values())}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def export(src, dst, checkpoint: str | None = None, dtype: str = "stored", overwrite: bool = False,
           shard_gb: float = 5.0) -> None:
    """Writes the Diffusers folder `dst`. Raises `UserError`; nothing half-written is left."""
    model, dst = model_dir.open_model(src), pathlib.Path(dst)
    with whole_folder(dst, overwrite) as partial:
        shutil.copyfile(model.path / "model_index.json", partial / "model_index.json")
        for name in ("tokenizer", "scheduler"):
            shutil.copytree(model.path / name, partial / name)
        for component in model.components:
            start = time.time()
            (partial / component).mkdir()
            shutil.copyfile(model.path / component / "config.json", partial / component / "config.json")
            flat = model.load_numpy(component)
            if checkpoint and component in model.experts:
                flat = trained_weights(flat, checkpoint, component)
            patch = getattr(model.config(component), "patch_size", None) or (1, 2, 2)
            tensors = dict(key_table.to_theirs(component, flat, patch))
            if dtype != "stored":
                tensors = {k: v.astype(DTYPES[dtype]) for k, v in tensors.items()}
            write_tensors(partial / component, STEMS[component], tensors, int(shard_gb * 1e9))
            print(f"{component}: {len(tensors)} tensors, {time.time() - start:.1f} s", flush=True)
    print(f"{dst}: ready for WanPipeline.from_pretrained" + (f", with {checkpoint} merged in" if checkpoint else ""))


def main(_):
    FLAGS = flags.FLAGS
    export(FLAGS.src, FLAGS.dst, FLAGS.checkpoint, FLAGS.dtype, FLAGS.overwrite, FLAGS.shard_gb)


if __name__ == "__main__":
    flags.DEFINE_string("src", None, "folder written by convert.from_diffusers", required=True)
    flags.DEFINE_string("dst", None, "folder to write", required=True)
    flags.DEFINE_string("checkpoint", None, "run folder of grpo.train, or one of its checkpoints/<epoch>")
    flags.DEFINE_enum("dtype", "stored", ["stored", *DTYPES], "type to write; stored keeps each tensor's own")
    flags.DEFINE_float("shard_gb", 5.0, "largest file, GB")
    flags.DEFINE_bool("overwrite", False, "replace an existing --dst")
    cli.run(main)

"""Converts a Wan checkpoint in Diffusers layout to a model folder that this project reads.

    python -m convert.from_diffusers --src Wan-AI/Wan2.1-T2V-1.3B-Diffusers --dst models/wan-1.3b [--dtype bfloat16]

`--src` is a local folder or a hub id. bfloat16 keeps in float32 what the models keep so (the transformer's time
embedder, scale_shift_tables and norm2), and the VAE whole. Every tensor is accounted for, both ways.
"""

import json
import pathlib
import shutil
import time

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
from absl import flags
from tqdm import tqdm

from convert import key_table
from convert.folders import Shards, whole_folder
from wan_jax import cli, model_dir
from wan_jax import config as config_lib
from wan_jax import params as P
from wan_jax.cli import UserError

STEMS = {"transformer": "diffusion_pytorch_model", "transformer_2": "diffusion_pytorch_model",
         "vae": "diffusion_pytorch_model", "text_encoder": "model"}
PIPELINE = "WanPipeline"
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def source_folder(src: str) -> pathlib.Path:
    """The local folder, or the hub's snapshot. Raises `UserError` when neither is to be had."""
    path = pathlib.Path(src)
    if path.is_dir():
        return path
    if src.count("/") != 1 or path.is_absolute() or src.startswith("."):
        raise UserError(f"--src {src} is no folder, and no hub id of the form owner/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "tokenizer/*"]
    try:
        return pathlib.Path(snapshot_download(src, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(f"{src} is no local folder and cannot be downloaded ({str(error).splitlines()[0][:200]}); "
                        "check the spelling and network, or give --src a folder that holds model_index.json") from None


def check_pipeline(src: pathlib.Path) -> dict:
    """model_index.json of a Wan text-to-video pipeline. Raises `UserError` on anything else."""
    path = src / "model_index.json"
    if not path.is_file():
        raise UserError(f"{path} is missing: {src} is no checkpoint in Diffusers layout (the original Wan layout is "
                        "not read; use the '-Diffusers' repository)")
    try:
        index = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if index.get("_class_name") != PIPELINE:
        raise UserError(f"{path}: the pipeline is {index.get('_class_name')!r}, only {PIPELINE!r} (text to video) can "
                        "be converted")
    boundary = index.get("boundary_ratio")
    if two_experts(index) != (boundary is not None) or not 0 < (boundary or 0.5) < 1:
        raise UserError(f"{path}: boundary_ratio is {boundary} and transformer_2 is {index.get('transformer_2')}: "
                        "a model with two experts has both, with a ratio between 0 and 1")
    return index


def two_experts(index: dict) -> bool:
    """Whether the pipeline has a second transformer; [null, null] means none, as in TI2V-5B."""
    return any(index.get("transformer_2") or ())


def source_dtype(component: str, shards: Shards, table: list[key_table.Entry]):
    """float32 or bfloat16: what the component's matrices are stored in."""
    largest = max(table, key=lambda e: int(np.prod(e.shape)))
    return jnp.bfloat16 if shards.read(largest.key).dtype == ml_dtypes.bfloat16 else jnp.float32


def convert_component(component: str, src: pathlib.Path, dst: pathlib.Path, dtype: str) -> dict:
    """Writes one component's folder; returns its line of the manifest."""
    start = time.time()
    (dst / component).mkdir()
    if not (src / component).is_dir():
        raise UserError(f"{src / component} is missing: the download is not complete")
    shards = Shards(src / component, STEMS[component])
    try:
        config = config_lib.load(model_dir.COMPONENTS[component][0], src / component / "config.json")
        shutil.copyfile(src / component / "config.json", dst / component / "config.json")
        shapes = {k: v.shape for k, v in P.flatten(model_dir.abstract(component, config)[1]).items()}
        patch = getattr(config, "patch_size", None) or (1, 2, 2)
        table = key_table.entries(component, shapes, patch)
        key_table.check_coverage(component, table, shards.shapes)
    except (config_lib.ConfigError, key_table.KeyTableError) as error:
        raise UserError(f"{src}: {error}") from None
    exact = dtype == "source"  # every tensor in the type it is stored in
    kept = DTYPES["float32" if component == "vae" or exact else dtype]
    dtypes = {k: np.dtype(v.dtype) for k, v in P.flatten(model_dir.abstract(component, config, dtype=kept)[1]).items()}
    flat: dict[str, np.ndarray] = {}
    for entry in tqdm(table, desc=component, leave=False, disable=None):
        value = entry.to_ours(shards.read(entry.key))
        value = value if exact else value.astype(dtypes[entry.path])
        if entry.layer is None:
            flat[entry.path] = np.ascontiguousarray(value)
        else:
            if entry.layer == 0:
                flat[entry.path] = np.empty(shapes[entry.path], value.dtype)
            flat[entry.path][entry.layer] = value
    count, size = sum(v.size for v in flat.values()), sum(v.nbytes for v in flat.values())
    cli.check_space(dst.parent, size, f"the {component}")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(model_dir.params_path(dst, component), flat)
    print(f"{component}: {len(table)} tensors, {count:,} parameters, {size / 1e9:.3f} GB, {time.time() - start:.1f} s",
          flush=True)
    return {"tensors": len(table), "parameters": count, "bytes": size}


def convert(src: str, dst, dtype: str = "source", overwrite: bool = False) -> None:
    """Converts `src` (folder or hub id) into the folder `dst`. Raises `UserError`; nothing half-written is left."""
    dst, folder = pathlib.Path(dst), source_folder(src)
    index = check_pipeline(folder)
    for name in ("tokenizer", "scheduler"):
        if not (folder / name).is_dir():
            raise UserError(f"{folder / name} is missing: the download is not complete")
    with whole_folder(dst, overwrite) as partial:
        shutil.copyfile(folder / "model_index.json", partial / "model_index.json")
        for name in ("tokenizer", "scheduler"):
            shutil.copytree(folder / name, partial / name)
        manifest = {"format": model_dir.FORMAT, "source": src, "dtype": dtype}
        manifest["components"] = {c: convert_component(c, folder, partial, dtype) for c in model_dir.COMPONENTS
                                  if c != "transformer_2" or two_experts(index)}
        (partial / model_dir.MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    size = sum(f.stat().st_size for f in dst.rglob("*") if f.is_file())
    print(f"{dst}: {size / 1e9:.3f} GB, ready for grpo.train and wan_jax.sample")


def main(_):
    FLAGS = flags.FLAGS
    convert(FLAGS.src, FLAGS.dst, FLAGS.dtype, FLAGS.overwrite)


if __name__ == "__main__":
    flags.DEFINE_string("src", None, "folder in Diffusers layout, or hub id", required=True)
    flags.DEFINE_string("dst", None, "folder to write", required=True)
    flags.DEFINE_enum("dtype", "source", ["source", *DTYPES], "type of the weights; source keeps each tensor's own")
    flags.DEFINE_bool("overwrite", False, "replace an existing --dst")
    cli.run(main)

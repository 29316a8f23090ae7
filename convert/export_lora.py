"""Writes the adapters that a run trained as a LoRA file for Diffusers or ComfyUI.

    python -m convert.export_lora --src models/wan-1.3b --checkpoint runs/my_run --dst lora
    python -m convert.export_lora ... --format comfyui

`--dst` is a file (.safetensors) or a folder. `pipe.load_lora_weights` of Diffusers loads both
formats, ComfyUI's LoRA loader the one of `--format=comfyui`. A model with two experts gives two
files, ..._high_noise and ..._low_noise. Training can start from such a file (`config.lora.init`).
"""

import os
import pathlib

from absl import flags

from convert import lora
from wan_jax.command_line import cli
from wan_jax.errors import UserError
from wan_jax.storage import model_dir
from wan_jax.storage.paths import expand
from wan_jax.storage.trained_weights import load_trained

STEMS = {"diffusers": "pytorch_lora_weights", "comfyui": "comfyui_lora"}


def lora_file(dst: pathlib.Path, layout: str, expert: str, two: bool) -> pathlib.Path:
    """Return the path of one expert's file; `dst` is a file or a folder, `two` adds the expert."""
    if dst.suffix != ".safetensors":
        dst = dst / f"{STEMS[layout]}.safetensors"
    return dst.with_name(f"{dst.stem}_{lora.EXPERTS[expert]}.safetensors") if two else dst


def export(
    checkpoint, src, dst, layout: str = "diffusers", dtype: str = "float32", overwrite: bool = False
) -> dict[str, pathlib.Path]:
    """Write one file for each trained expert and return {expert: file}.

    All files are read back and checked before the first one is renamed to its final name, so no
    incomplete file is left. Raises `UserError` when the checkpoint does not belong to the model,
    holds no adapters, or the destination cannot be written.
    """
    # What is read, and which files will be written
    model, dst = model_dir.open_model(src), expand(dst)
    run = expand(checkpoint)
    checkpoints = run if run.parent.name == "checkpoints" else run / "checkpoints"
    for source in (model.path, checkpoints):
        if dst.is_relative_to(source):
            raise UserError(
                f"the destination {dst} is inside {source}, which is read; choose another --dst"
            )
    config, experts, meta = load_trained(checkpoint)
    model.check_same(meta.get("model_digest"), meta["model"], str(checkpoint), "--src")
    if config is None:
        raise UserError(
            f"{checkpoint} trained all weights, not adapters: write the whole model with "
            "python -m convert.to_diffusers"
        )
    two = len(model.experts) > 1
    if experts.keys() - set(model.experts):
        raise UserError(
            f"{checkpoint} trained {', '.join(experts)}, the model {src} has "
            f"{', '.join(model.experts)}: it was trained from another one"
        )
    files = {expert: lora_file(dst, layout, expert, two) for expert in experts}
    for path in files.values():
        if path.exists() and not overwrite:
            raise UserError(
                f"{path} exists already; remove it, choose another --dst, or give --overwrite"
            )
        if path.is_dir() or path.parent.is_file():
            raise UserError(f"--dst {dst} cannot be written: give a .safetensors file or a folder")
    # Write and check all files under temporary names, then rename them
    partial = {expert: path.with_name(f".partial-{path.name}") for expert, path in files.items()}
    try:
        for expert, adapters in experts.items():
            kernels = lora.dense_layers(model.config(expert))
            tensors = lora.to_tensors(adapters, config, kernels, layout, dtype)
            partial[expert].parent.mkdir(parents=True, exist_ok=True)
            cli.check_space(dst, sum(v.nbytes for v in tensors.values()), "the LoRA file")
            lora.write(partial[expert], tensors, config, kernels, model.metadata)
            with open(partial[expert], "rb") as file:
                os.fsync(file.fileno())
        for expert, path in files.items():
            partial[expert].replace(path)
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)
    # Show how to load them
    for expert, path in files.items():
        second = ", load_into_transformer_2=True" if expert == "transformer_2" else ""
        name = f', adapter_name="{lora.EXPERTS[expert]}"' if two else ""
        print(
            f"{path}: rank {config.rank} on {', '.join(config.targets)}, "
            f"{path.stat().st_size / 1e6:.1f} MB\n"
            f'  Diffusers: pipe.load_lora_weights("{path}"{name}{second})'
            + ("\n  ComfyUI: put it into models/loras" if layout == "comfyui" else "")
        )
    return files


def main(_):
    FLAGS = flags.FLAGS
    export(FLAGS.checkpoint, FLAGS.src, FLAGS.dst, FLAGS.format, FLAGS.dtype, FLAGS.overwrite)


if __name__ == "__main__":
    flags.DEFINE_string(
        "src", None, "folder of the trained model, written by convert.from_diffusers", required=True
    )
    flags.DEFINE_string(
        "checkpoint",
        None,
        "run folder of grpo.train, or one of its checkpoints/EPOCH",
        required=True,
    )
    flags.DEFINE_string("dst", None, ".safetensors file or folder to write", required=True)
    flags.DEFINE_enum("format", "diffusers", list(lora.PREFIXES), "program that will read the file")
    flags.DEFINE_enum("dtype", "float32", list(lora.DTYPES), "data type to write")
    flags.DEFINE_bool("overwrite", False, "replace existing files")
    cli.run(main)

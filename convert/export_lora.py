"""Writes the adapters that a run trained as a LoRA file for Diffusers or ComfyUI, or as PEFT's folder.

    python -m convert.export_lora --src models/wan2.1-1.3b --checkpoint runs/my_run --dst lora
    python -m convert.export_lora ... --format comfyui
    python -m convert.export_lora ... --format peft

`--dst` is a file (.safetensors) or a folder. `pipe.load_lora_weights` of Diffusers loads the first
two formats, ComfyUI's LoRA loader the one of `--format=comfyui`. A model with two experts gives two
files, ..._high_noise and ..._low_noise. `--format=peft` writes a folder with
adapter_model.safetensors and adapter_config.json, which `peft.PeftModel.from_pretrained` reads, or
one in it for each of two experts. Training can start from all of them (`config.lora.init`).

Only what the run trained is written. LoRAs that its base had (`config.model.loras`) are named, and
must be loaded with it.
"""

import json
import os
import pathlib
import shutil

from absl import flags

from convert import lora
from convert.choices import LORA_DTYPES, LORA_FORMATS
from wan_jax.command_line import cli
from wan_jax.errors import UserError
from wan_jax.storage import merged_loras, model_dir
from wan_jax.storage.paths import expand
from wan_jax.storage.trained_weights import load_trained

STEMS = {"diffusers": "pytorch_lora_weights", "comfyui": "comfyui_lora"}
PEFT = "adapter_model.safetensors", "adapter_config.json"


def lora_file(dst: pathlib.Path, layout: str, expert: str, two: bool) -> pathlib.Path:
    """Return the path of one expert's file; `dst` is a file or a folder, `two` adds the expert.

    Raises `UserError` where PEFT's folder has the name of a file.
    """
    if layout == "peft":
        if dst.suffix == ".safetensors":
            raise UserError(f"--dst {dst} must be a folder for --format=peft, not a file")
        return (dst / lora.EXPERTS[expert] if two else dst) / PEFT[0]
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
    # Write and check all files in temporary folders, then rename them
    partial = {e: path.parent / f".partial-{path.name}" / path.name for e, path in files.items()}
    base = merged_loras.recorded(meta)
    metadata = model.metadata | merged_loras.metadata(base)
    try:
        for expert, adapters in experts.items():
            kernels = lora.dense_layers(model.config(expert))
            tensors = lora.to_tensors(adapters, config, kernels, layout, dtype)
            folder = partial[expert].parent
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            cli.check_space(dst, sum(v.nbytes for v in tensors.values()), "the LoRA file")
            if layout == "peft":
                settings = lora.peft_settings(config, kernels)
                (folder / PEFT[1]).write_text(json.dumps(settings, indent=2) + "\n")
            lora.write(partial[expert], tensors, config, kernels, metadata)
            for path in folder.iterdir():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        for expert, path in files.items():
            for source in partial[expert].parent.iterdir():
                source.replace(path.with_name(source.name))
    finally:
        for path in partial.values():
            shutil.rmtree(path.parent, ignore_errors=True)
    # Show how to load them
    for expert, path in files.items():
        second = ", load_into_transformer_2=True" if expert == "transformer_2" else ""
        name = f', adapter_name="{lora.EXPERTS[expert]}"' if two else ""
        print(
            f"{path}: rank {config.rank} on {', '.join(config.targets)}, "
            f"{path.stat().st_size / 1e6:.1f} MB"
        )
        if layout == "peft":
            print(f'  PEFT: PeftModel.from_pretrained(pipe.{expert}, "{path.parent}")')
        else:
            print(f'  Diffusers: pipe.load_lora_weights("{path}"{name}{second})')
        if layout == "comfyui":
            print("  ComfyUI: put it into models/loras")
    if base:
        print(
            f"only the trained part was written: the run's base had {', '.join(map(str, base))} "
            "merged, which must be loaded with it; python -m convert.to_diffusers writes both"
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
        "run folder of grpo.train, RUN/best or RUN/checkpoints/EPOCH",
        required=True,
    )
    flags.DEFINE_string("dst", None, ".safetensors file or folder to write", required=True)
    flags.DEFINE_enum("format", "diffusers", LORA_FORMATS, "program that will read the file")
    flags.DEFINE_enum("dtype", "float32", LORA_DTYPES, "data type to write")
    flags.DEFINE_bool("overwrite", False, "replace existing files")
    cli.run(main)

"""Writes the adapters that a run trained as a LoRA file for Diffusers or ComfyUI.

    python -m convert.export_lora --src models/wan-1.3b --checkpoint runs/my_run --dst lora
    [--format comfyui]

`--dst` is a file (.safetensors) or a folder. The file of --format=diffusers is loaded by
`pipe.load_lora_weights("lora/pytorch_lora_weights.safetensors")`, that of --format=comfyui by
ComfyUI's LoRA loader, and by Diffusers too. A model with two experts gives two files,
..._high_noise and ..._low_noise. Training can start from such a file: `config.lora.init`.
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


def file_of(dst: pathlib.Path, layout: str, expert: str, two: bool) -> pathlib.Path:
    """The file of one expert, for --dst as a file or a folder."""
    if dst.suffix != ".safetensors":
        dst = dst / f"{STEMS[layout]}.safetensors"
    return dst.with_name(f"{dst.stem}_{lora.EXPERTS[expert]}.safetensors") if two else dst


def export(
    checkpoint, src, dst, layout: str = "diffusers", dtype: str = "float32", overwrite: bool = False
) -> dict[str, pathlib.Path]:
    """Writes one file for each trained expert and returns {expert: file}.

    Every file is read again and checked before the first one gets its name, so nothing half-written
    is left. Raises `UserError`.
    """
    model, dst = model_dir.open_model(src), expand(dst)
    run = expand(checkpoint)
    for read in (model.path, run if run.parent.name == "checkpoints" else run / "checkpoints"):
        if dst.is_relative_to(read):
            raise UserError(
                f"the destination {dst} lies inside {read}, which is read; choose another --dst"
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
    files = {expert: file_of(dst, layout, expert, two) for expert in experts}
    for path in files.values():
        if path.exists() and not overwrite:
            raise UserError(
                f"{path} exists already; remove it, choose another --dst, or give --overwrite"
            )
        if path.is_dir() or path.parent.is_file():
            raise UserError(f"--dst {dst} cannot be written: give a .safetensors file or a folder")
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
    for expert, path in files.items():
        second = ", load_into_transformer_2=True" if expert == "transformer_2" else ""
        name = f', adapter_name="{lora.EXPERTS[expert]}"' if two else ""
        print(
            f"{path}: rank {config.rank} on {', '.join(config.targets)}, {path.stat().st_size / 1e6:.1f} MB\n"
            f'  Diffusers: pipe.load_lora_weights("{path}"{name}{second})'
            + ("\n  ComfyUI: put it into models/loras" if layout == "comfyui" else "")
        )
    return files


def main(_):
    FLAGS = flags.FLAGS
    export(FLAGS.checkpoint, FLAGS.src, FLAGS.dst, FLAGS.format, FLAGS.dtype, FLAGS.overwrite)


if __name__ == "__main__":
    flags.DEFINE_string(
        "src", None, "the trained model: folder of convert.from_diffusers", required=True
    )
    flags.DEFINE_string(
        "checkpoint", None, "run folder of grpo.train, or one of its checkpoints/<n>", required=True
    )
    flags.DEFINE_string("dst", None, ".safetensors file or folder to write", required=True)
    flags.DEFINE_enum("format", "diffusers", list(lora.PREFIXES), "layout of the file")
    flags.DEFINE_enum("dtype", "float32", list(lora.DTYPES), "type to write")
    flags.DEFINE_bool("overwrite", False, "replace existing files")
    cli.run(main)

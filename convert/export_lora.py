"""Writes the adapters that a run trained as a LoRA file for Diffusers or ComfyUI, or as PEFT's folder.

    python -m convert.export_lora --src models/wan2.1-1.3b --checkpoint runs/my_run --dst lora
    python -m convert.export_lora ... --format comfyui
    python -m convert.export_lora ... --format peft
    python -m convert.export_lora ... --push_to_hub OWNER/NAME [--private]

`--dst` is a file (.safetensors) or a folder. `pipe.load_lora_weights` of Diffusers loads the first
two formats, ComfyUI's LoRA loader the one of `--format=comfyui`. A model with two experts gives two
files, ..._high_noise and ..._low_noise. `--format=peft` writes a folder with
adapter_model.safetensors and adapter_config.json, which `peft.PeftModel.from_pretrained` reads, or
one in it for each of two experts. Training can start from all of them (`config.lora.init`).

A folder also gets a model card: README.md with the run's result, curve, pictures and settings
(`grpo.report.model_card`). `--push_to_hub` uploads files and card (`convert.hub`).

Only what the run trained is written. LoRAs that its base had (`config.model.loras`) are named, and
must be loaded with it.
"""

import json
import os
import pathlib
import shutil
import typing
from collections.abc import Mapping

from absl import flags

from convert import lora
from convert.choices import LORA_DTYPES, LORA_FORMATS
from convert.hub import LOCAL, Publishing
from wan_jax.command_line import cli
from wan_jax.errors import UserError
from wan_jax.models import presets
from wan_jax.models.lora import LoRAConfig
from wan_jax.storage import checkpoint as checkpoint_lib
from wan_jax.storage import lora_names, merged_loras, model_dir
from wan_jax.storage.paths import expand
from wan_jax.storage.trained_weights import load_trained

if typing.TYPE_CHECKING:
    from grpo.report.model_card import ExportedLoRA

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
    checkpoint,
    src,
    dst,
    layout: str = "diffusers",
    dtype: str = "float32",
    overwrite: bool = False,
    publishing: Publishing = LOCAL,
) -> dict[str, pathlib.Path]:
    """Write one file for each trained expert, and a model card, and return {expert: file}.

    All files are read back and checked before the first one is renamed to its final name, so no
    incomplete file is left. Raises `UserError` when the checkpoint does not belong to the model,
    holds no adapters, or the destination cannot be written.
    """
    from grpo.report import model_card  # not above: matplotlib, which --help does without

    # What is read, and which files will be written
    publishing.check()
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
    # The model card, and what the files say of their origin
    base = merged_loras.recorded(meta)
    run = checkpoint_lib.find(checkpoint)[0].folder.parent
    root = dst.parent if dst.suffix == ".safetensors" else dst
    written = {e: path.relative_to(root) for e, path in files.items()}
    described = describe(model, meta, config, layout, written, publishing, run.name)
    card = model_card.make_card(run, described)
    # Write and check all files in temporary folders, then rename them
    partial = {e: path.parent / f".partial-{path.name}" / path.name for e, path in files.items()}
    metadata = model.metadata | merged_loras.metadata(base)
    metadata |= model_card.metadata(described, run)
    try:
        for expert, adapters in experts.items():
            kernels = lora_names.dense_layers(model.config(expert))
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
    if publishing.card and root == dst:
        write_card(dst, card)
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
    # Upload
    if publishing.repository:
        settings = [path.with_name(PEFT[1]) for path in files.values()] if layout == "peft" else []
        paths = {p.relative_to(root).as_posix(): p for p in (*files.values(), *settings)}
        try:
            print(f"uploaded to {publishing.upload(paths | card)}")
        except UserError as error:
            local = [name for name in card if (root / name).is_file()] if root == dst else []
            again = publishing.command(root, (*paths, *local))
            raise UserError(
                f"{error}. Nothing is lost: {', '.join(map(str, files.values()))} is written, and can be "
                f"uploaded without another export by `{again}`"
            ) from None
    return files


def describe(
    model: model_dir.ModelDir,
    meta: dict,
    config: LoRAConfig,
    layout: str,
    files: Mapping[str, pathlib.PurePath],
    publishing: Publishing,
    run: str,
) -> "ExportedLoRA":
    """Return what a model card says of the export. meta: of the checkpoint. files: of each expert,
    relative to the card. run: name of its folder.
    """
    from grpo.report.model_card import ExportedLoRA

    # The base's hub id: as given, or of a published model that was converted from hub or a copy
    source, name = str(model.manifest.get("source") or model.path), presets.published(model)
    known = presets.PRESETS[name].repository if name else ""
    copied = known and pathlib.PurePath(source).name == pathlib.PurePath(known).name
    base = publishing.base_model or (known if copied else "")
    return ExportedLoRA(
        name=publishing.repository.rpartition("/")[2] or run,
        layout=layout,
        files=files,
        experts=model.experts,
        repository=publishing.repository,
        base=base or pathlib.PurePath(source).name,
        on_hub=bool(base),
        license=publishing.license,
        epoch=meta["epoch"],
        rank=config.rank,
        alpha=config.alpha,
        targets=tuple(config.targets),
        loras=tuple(
            f"{' and '.join(pathlib.PurePath(f).name for f in each.files if f)}, scale {each.scale:g}"
            for each in merged_loras.recorded(meta)
        ),
        fps=presets.PRESETS[name].sampling.fps if name else presets.GENERAL.fps,
        config=meta["config"],
    )


def write_card(folder: pathlib.Path, card: Mapping[str, bytes]) -> None:
    """Write a model card and its pictures, unless the folder has a README.md of another origin."""
    from grpo.records.run_files import write_atomically
    from grpo.report.model_card import CARD, MARK

    readme = folder / CARD
    if readme.exists() and MARK not in readme.read_text(encoding="utf-8", errors="replace"):
        print(f"{readme} is not a card of an export and stays as it is; no card was written")
        return
    for name, content in card.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / name, content)
    print(f"{readme}: the model card")


def main(_):
    FLAGS = flags.FLAGS
    publishing = Publishing(
        card=FLAGS.card,
        base_model=FLAGS.base_model,
        license=FLAGS.license,
        repository=FLAGS.push_to_hub,
        private=FLAGS.private,
    )
    export(
        FLAGS.checkpoint,
        FLAGS.src,
        FLAGS.dst,
        FLAGS.format,
        FLAGS.dtype,
        FLAGS.overwrite,
        publishing,
    )


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
    flags.DEFINE_bool(
        "card", True, "write a model card, README.md with pictures, where --dst is a folder"
    )
    flags.DEFINE_string(
        "base_model",
        "",
        "hub id of the base model for the card; not given: that of a published model",
    )
    flags.DEFINE_string("license", "apache-2.0", "licence of the LoRA for the card")
    flags.DEFINE_string(
        "push_to_hub",
        "",
        "OWNER/NAME of a repository of the Hugging Face hub, made if needed, to upload files and card "
        "to; the token is that of HF_TOKEN or `hf auth login`",
    )
    flags.DEFINE_bool("private", False, "the repository of --push_to_hub is private")
    cli.run(main)

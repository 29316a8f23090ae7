"""Writes a full-size model with random weights in Diffusers layout, without PyTorch.

    python -m benchmarks.random_model --model wan2.1-14b --out /tmp/wan-14b --dtype bfloat16
    python -m benchmarks.random_model --model wan2.2-a14b --out /tmp/wan-a14b --link_expert

Weights are sharded safetensors files of 5 GB with an index, as published; the tokenizer is the
small one of `assets/tiny-wan`. Matrices preserve the variance, norm weights are 1, all others are
small. For speed the values are one block of random numbers, read from varying offsets; samples of
the model are noise. With `--link_expert` the second expert is a link to the first one, for disks
that cannot hold two.
"""

import dataclasses
import json
import math
import pathlib

import ml_dtypes
import numpy as np
from absl import app, flags
from safetensors.numpy import save_file

from convert.plan import STEMS
from examples.tiny_wan import sizes, tokenizer
from wan_jax.models import flat_params
from wan_jax.models.presets import PRESETS, Preset
from wan_jax.storage import key_table, model_dir

SHARD_BYTES = 5e9
BLOCK = 2**22  # number of random values drawn
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


class Values:
    """Normal numbers of any shape and deviation: one block, repeated from varying offsets."""

    def __init__(self, dtype: np.dtype, seed: int = 0):
        self.rng = np.random.default_rng(seed)
        self.dtype = dtype
        self.scaled: dict[float, np.ndarray] = {}
        self.block = self.rng.standard_normal(BLOCK, np.float32)

    def __call__(self, shape: tuple[int, ...], deviation: float) -> np.ndarray:
        if deviation not in self.scaled:
            self.scaled[deviation] = (self.block * deviation).astype(self.dtype)
        start = int(self.rng.integers(BLOCK))
        return np.resize(
            np.roll(self.scaled[deviation].view(f"u{self.dtype.itemsize}"), start), shape
        ).view(self.dtype)


def tensor(entry: key_table.Entry, values: Values) -> np.ndarray:
    """Return random values for one tensor of the state dict."""
    if "norm" in entry.key and entry.key.endswith(("weight", "gamma")):
        return np.ones(entry.shape, values.dtype)
    matrix = len(entry.shape) > 1 and "table" not in entry.key and entry.key != "shared.weight"
    return values(entry.shape, math.prod(entry.shape[1:]) ** -0.5 if matrix else 0.02)


def write_component(folder: pathlib.Path, component: str, config, values: Values) -> int:
    """Write config, weights and index of one component. Returns the bytes of its tensors."""
    folder.mkdir(parents=True)
    settings = {
        "transformer": sizes.TRANSFORMER,
        "vae": sizes.VAE,
        "text_encoder": sizes.TEXT_ENCODER,
    }[component]
    (folder / "config.json").write_text(
        json.dumps(settings | dataclasses.asdict(config), indent=2) + "\n"
    )
    shapes = {
        k: v.shape for k, v in flat_params.flatten(model_dir.abstract(component, config)[1]).items()
    }
    table = sorted(key_table.entries(component, shapes), key=lambda e: e.key)
    shards: list[list[key_table.Entry]] = [[]]
    filled = 0
    for entry in table:
        size = math.prod(entry.shape) * values.dtype.itemsize
        if shards[-1] and filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += size
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        number = f"-{i:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        name = f"{STEMS[component]}{number}.safetensors"
        save_file(
            {e.key: tensor(e, values) for e in shard}, folder / name, metadata={"format": "pt"}
        )
        weight_map |= {entry.key: name for entry in shard}
    total = sum(math.prod(e.shape) for e in table) * values.dtype.itemsize
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / f"{STEMS[component]}.safetensors.index.json").write_text(json.dumps(index))
    return total


def write(out, preset: Preset, dtype: str = "bfloat16", link_expert: bool = False) -> int:
    """Write the whole folder, the VAE in float32. Returns the bytes of all tensors written."""
    out = pathlib.Path(out)
    parts = {"text_encoder": preset.text_encoder, "vae": preset.vae} | dict.fromkeys(
        preset.experts, preset.transformer
    )
    values, total = {name: Values(d) for name, d in DTYPES.items()}, 0
    for name, config in parts.items():
        if name == "transformer_2" and link_expert:
            (out / name).symlink_to("transformer")
        else:
            kind = name.removesuffix("_2")
            total += write_component(
                out / name, kind, config, values["float32" if name == "vae" else dtype]
            )
    index = sizes.MODEL_INDEX | (
        {"boundary_ratio": preset.boundary, "expand_timesteps": preset.expand_timesteps}
        | dict.fromkeys(preset.experts, sizes.MODEL_INDEX["transformer"])
    )
    (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    (out / "scheduler").mkdir()
    scheduler = sizes.SCHEDULER | {"flow_shift": preset.flow_shift}
    (out / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler, indent=2) + "\n")
    tokenizer.write(out / "tokenizer")
    return total


def main(_):
    settings = flags.FLAGS
    size = write(settings.out, PRESETS[settings.model], settings.dtype, settings.link_expert)
    print(f"{settings.out}: {size / 1e9:.2f} GB")


if __name__ == "__main__":
    flags.DEFINE_enum("model", None, list(PRESETS), "model of the family", required=True)
    flags.DEFINE_string("out", None, "new folder to write", required=True)
    flags.DEFINE_enum(
        "dtype", "bfloat16", list(DTYPES), "data type of transformer and text encoder"
    )
    flags.DEFINE_bool("link_expert", False, "make the second expert a link to the first")
    app.run(main)

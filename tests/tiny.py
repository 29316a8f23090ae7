"""A random Wan pipeline in Diffusers layout, a fraction of a second to write, without PyTorch."""

import json
import pathlib
from collections.abc import Mapping

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from convert.plan import STEMS
from examples.tiny_wan import sizes
from examples.tiny_wan.assemble import assemble
from wan_jax.models import config as config_lib
from wan_jax.models import flat_params
from wan_jax.storage import key_table, model_dir

SETTINGS = {
    "transformer": sizes.TRANSFORMER
    | {
        "num_attention_heads": 2,
        "attention_head_dim": 24,
        "text_dim": 24,
        "freq_dim": 32,
        "ffn_dim": 48,
        "num_layers": 2,
    },
    "vae": sizes.VAE
    | {
        "base_dim": 8,
        "latents_mean": [0.1 * i - 0.8 for i in range(16)],
        "latents_std": [0.5 + 0.1 * i for i in range(16)],
    },
    "text_encoder": sizes.TEXT_ENCODER
    | {"d_model": 24, "d_kv": 6, "num_heads": 3, "d_ff": 40, "num_layers": 2},
}
TI2V = {
    "transformer": SETTINGS["transformer"] | {"in_channels": 48, "out_channels": 48},
    "vae": sizes.VAE
    | {
        "base_dim": 16,
        "decoder_base_dim": 24,
        "z_dim": 48,
        "is_residual": True,
        "in_channels": 12,
        "out_channels": 12,
        "patch_size": 2,
        "scale_factor_spatial": 16,
        "latents_mean": [0.02 * i - 0.5 for i in range(48)],
        "latents_std": [0.5 + 0.02 * i for i in range(48)],
    },
    "text_encoder": SETTINGS["text_encoder"],
}


def state_dict_shapes(component: str, settings: Mapping) -> dict[str, tuple[int, ...]]:
    """Key to shape of the published layout."""
    config = config_lib.from_dict(model_dir.COMPONENTS[component][0], settings)
    shapes = {
        k: v.shape for k, v in flat_params.flatten(model_dir.abstract(component, config)[1]).items()
    }
    return {e.key: e.shape for e in key_table.entries(component, shapes)}


def random_weights(
    shapes: Mapping[str, tuple[int, ...]], seed: int, dtype=np.float32
) -> dict[str, np.ndarray]:
    """Matrices that keep the variance, norm weights around 1, the rest small and never zero; in key
    order.
    """
    rng = np.random.default_rng(seed)
    weights = {}
    for key in sorted(shapes):
        value = rng.standard_normal(shapes[key])
        if "norm" in key and key.endswith(("weight", "gamma")):
            value = 1 + 0.2 * value
        elif len(shapes[key]) >= 2 and "table" not in key and not key.startswith("shared"):
            value = value * np.prod(shapes[key][1:]) ** -0.5
        else:
            value = 0.3 * value
        weights[key] = value.astype(dtype)
    return weights


def write_pipeline(
    path,
    seed: int = 0,
    bf16: tuple[str, ...] = (),
    boundary: float | None = None,
    ti2v: bool = False,
) -> pathlib.Path:
    """Writes the folder; components named in `bf16` are stored in bfloat16. With a boundary it has
    two experts, as Wan 2.2 A14B; `ti2v` is the layout of Wan 2.2 TI2V-5B.
    """
    path = pathlib.Path(path)
    parts = (TI2V if ti2v else SETTINGS) | (
        {"transformer_2": SETTINGS["transformer"]} if boundary else {}
    )
    for i, (component, settings) in enumerate(parts.items()):
        folder = path / component
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(settings))
        dtype = ml_dtypes.bfloat16 if component in bf16 else np.float32
        weights = random_weights(state_dict_shapes(component, settings), seed + i, dtype)
        save_file(weights, folder / f"{STEMS[component]}.safetensors", metadata={"format": "pt"})
    assemble(path)
    if boundary or ti2v:
        index = json.loads((path / "model_index.json").read_text())
        index |= {
            "boundary_ratio": boundary,
            "transformer_2": index["transformer"] if boundary else [None, None],
            "expand_timesteps": ti2v,
        }
        (path / "model_index.json").write_text(json.dumps(index))
    return path


def stored_arrays(model: model_dir.ModelDir, component: str) -> dict[str, np.ndarray]:
    """Return the arrays of a component as stored, on the host."""
    store = model.arrays(component)
    return {name: store.read(name) for name in store.shapes}

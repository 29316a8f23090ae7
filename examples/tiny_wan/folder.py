"""Reads and writes the component folders of a Diffusers checkpoint for the training scripts."""

import json
import pathlib

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from safetensors.numpy import load_file

from wan_jax.models import flat_params
from wan_jax.models.config import VAEConfig, from_dict
from wan_jax.models.vae import AutoencoderKLWan
from wan_jax.storage import key_table
from wan_jax.storage.tensor_files import save_tensors


def save(
    component: str,
    flat: dict,
    config: dict,
    out: pathlib.Path,
    name="diffusion_pytorch_model.safetensors",
):
    """Write config.json and bf16 safetensors under the published names.

    Args:
      component: "transformer", "vae" or "text_encoder".
      flat: weights by our names.
      config: of config.json.
      out: folder to write.
      name: of the safetensors file.
    """
    out.mkdir(parents=True, exist_ok=True)
    host = {k: np.asarray(v).astype(ml_dtypes.bfloat16) for k, v in flat.items()}
    save_tensors(dict(key_table.to_theirs(component, host)), out / name, metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def subtree(flat: dict, name: str) -> dict:
    """Return what a flat dict has below `name`, without this part of the keys."""
    prefix = name + "/"
    return {k.removeprefix(prefix): v for k, v in flat.items() if k.startswith(prefix)}


def load_flat(folder: pathlib.Path, component: str, shapes: dict) -> dict[str, np.ndarray]:
    """Return a component folder's tensors by our names. shapes: those expected, by our names."""
    return key_table.to_ours(component, load_file(next(folder.glob("*.safetensors"))), shapes)


def load_component(folder, component: str, config_class, module) -> tuple[nnx.GraphDef, nnx.State]:
    """Return the graph and the weights of a component folder's module, for `nnx.merge`.

    A jitted function takes the weights as an argument: constants would be copied into its code.

    Args:
      folder: of the component.
      component: "transformer", "vae" or "text_encoder".
      config_class: dataclass into which its config.json is read.
      module: builds the module from that config.
    """
    folder = pathlib.Path(folder)
    config = from_dict(config_class, json.loads((folder / "config.json").read_text()))
    graphdef, like = nnx.split(nnx.eval_shape(lambda: module(config)))
    abstract = flat_params.flatten(like)
    flat = load_flat(folder, component, {k: v.shape for k, v in abstract.items()})
    state = flat_params.unflatten(
        like, {k: jnp.asarray(v).astype(abstract[k].dtype) for k, v in flat.items()}
    )
    return graphdef, state


def load_vae(folder, dtype):
    """Return the graph and the weights of a component folder's VAE."""
    return load_component(
        folder, "vae", VAEConfig, lambda c: AutoencoderKLWan(c, dtype=dtype, rngs=nnx.Rngs(0))
    )

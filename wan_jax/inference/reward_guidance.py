"""Reward guidance at sampling: Flow-NRG (Liu et al., arXiv 2501.13918).

A small transformer of Wan's architecture, the reward head, predicts the reward of the finished
video from noisy latents, their noise level and the prompt. The velocity is shifted along the
gradient of that prediction. `python -m grpo.reward_head` trains it; `python -m wan_jax.sample
--reward_head=... --reward_guidance=...` and `grpo.evaluate` use it. The head starts from the first
blocks of the video model, as in the paper, or is small with random weights.

The shift follows from tilting the model's distribution to p(x) exp(w r(x)). With x_s = (1 - s) x0 +
s e and v the mean of e - x0 given x_s, the score is -(x_s + (1 - s) v) / s, so v = -(x_s + s score)
/ (1 - s). To first order in w, with r the expected reward given x_s, tilting adds w grad r to the
score, and so -w s / (1 - s) grad r to v.
"""

import dataclasses
import json
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open

from wan_jax.diffusion.guidance import TextBatch
from wan_jax.diffusion.solvers import per_sample
from wan_jax.errors import UserError
from wan_jax.models import flat_params
from wan_jax.models.config import TransformerConfig
from wan_jax.models.transformer import WanTransformer3D
from wan_jax.storage import integrity
from wan_jax.storage.model_dir import ModelDir
from wan_jax.storage.tensor_files import save_tensors

Array = jax.Array
# Upper bound of s / (1 - s), which is 1e6 in the first step, where the noise has no information on
# the reward.
MAX_NOISE_RATIO = 10.0


def head_config(model: TransformerConfig, heads: int = 4, layers: int = 2) -> TransformerConfig:
    """Return the configuration of a small head for a model's latents and prompts: width 32 x heads,
    one output per patch element.
    """
    width = 32 * heads
    return dataclasses.replace(
        model,
        num_attention_heads=heads,
        attention_head_dim=32,
        out_channels=1,
        ffn_dim=4 * width,
        freq_dim=64,
        num_layers=layers,
    )


def make_head(config: TransformerConfig, seed: int = 0) -> WanTransformer3D:
    """Return a head with random weights, fp32."""
    return WanTransformer3D(config, dtype=jnp.float32, attention="chunked", rngs=nnx.Rngs(seed))


def from_model(
    model: TransformerConfig, state: nnx.State, layers: int, seed: int = 0
) -> WanTransformer3D:
    """Return a head, fp32, with the embeddings and first blocks of a model and a new last layer.

    state: the arrays of the model; adapters among them are ignored. Raises ValueError when the
    model has fewer blocks than `layers`.
    """
    if not 1 <= layers <= model.num_layers:
        raise ValueError(
            f"layers={layers} must be from 1 to {model.num_layers}, the model's blocks"
        )
    graphdef, fresh = nnx.split(
        make_head(dataclasses.replace(model, num_layers=layers, out_channels=1), seed)
    )
    source = flat_params.flatten(state)

    def initial(name: str, value: Array) -> Array:
        if name.startswith("proj_out/"):
            return value
        return jnp.asarray(
            source[name][:layers] if name.startswith("blocks/") else source[name], jnp.float32
        )

    flat = {name: initial(name, value) for name, value in flat_params.flatten(fresh).items()}
    return nnx.merge(graphdef, flat_params.unflatten(fresh, flat))


def predict(head: WanTransformer3D, latents: Array, timestep: Array, text: TextBatch) -> Array:
    """Return the expected reward, fp32 [B].

    latents fp32 [B,F,H,W,C]; timestep scalar or [B], on the 0..1000 scale.
    """
    t = jnp.broadcast_to(timestep, latents.shape[:1])
    out = head(latents, t, text.embeddings.astype(jnp.float32), text_padding=text.padding)
    return jnp.mean(out, axis=tuple(range(1, out.ndim)))


def shift(head: WanTransformer3D, latents: Array, sigma, timestep, text: TextBatch) -> Array:
    """Return min(s / (1 - s), 10) grad r, fp32 [B,F,H,W,C]: what guidance of weight 1 subtracts
    from the velocity. sigma scalar or [B].
    """
    # videos are independent, so the gradient of the sum has each video's own gradient
    gradient = jax.grad(lambda x: jnp.sum(predict(head, x, timestep, text)))(latents)
    sigma = jnp.asarray(sigma, jnp.float32)
    return (
        per_sample(jnp.minimum(sigma / jnp.maximum(1.0 - sigma, 1e-9), MAX_NOISE_RATIO), latents)
        * gradient
    )


def guidance(
    path: str | None, weight: float, config: TransformerConfig, model: ModelDir | None = None
) -> Callable | None:
    """Return the `shift` of `pipeline.make_ode_step` by the head in a file, times `weight`; None
    without a file. Raises `UserError` as `load_head`.
    """
    if not path:
        return None
    head = load_head(path, config, model)
    return lambda x, *args: weight * shift(head, x, *args)


def save_head(path, head: WanTransformer3D, metadata: Mapping[str, str] | None = None) -> None:
    """Write one safetensors file with its configuration, `metadata` and a digest of everything in
    the header.
    """
    arrays = {k: np.asarray(v) for k, v in flat_params.flatten(nnx.state(head, nnx.Param)).items()}
    values = {"config": json.dumps(dataclasses.asdict(head.config)), **(metadata or {})}
    save_tensors(arrays, path, metadata=values | {"digest": _digest(arrays, values)})


def load_head(path, config: TransformerConfig, model: ModelDir | None = None) -> WanTransformer3D:
    """Read a head.

    config, model: the model that it is to guide. Raises `UserError` when the file is damaged, not a
    head, for other latents or prompts, or was trained on another model.
    """
    # Read the file, and compare it with its digest.
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = dict(file.metadata() or {})
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        digest = metadata.pop("digest", None)
        if digest is not None and digest != _digest(arrays, metadata):
            raise UserError(
                f"{path} is damaged: its values differ from what was written; make the head again "
                "with python -m grpo.reward_head"
            )
        values = json.loads(metadata["config"])
        fields: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items()
        }
        saved_config = TransformerConfig(**fields)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not a reward head ({error}): make one with python -m grpo.reward_head"
        ) from None
    # Does it fit the model?
    for name in ("in_channels", "text_dim", "patch_size"):
        if getattr(saved_config, name) != getattr(config, name):
            raise UserError(
                f"reward head {path} has {name}={getattr(saved_config, name)}, this model has "
                f"{getattr(config, name)}: it was trained for another one"
            )
    if model is not None:
        model.check_same(
            metadata.get("wan_jax_model"), metadata.get("model", "another"), f"reward head {path}"
        )
    # Build the head with these arrays.
    graphdef, state = nnx.split(nnx.eval_shape(lambda: make_head(saved_config)))
    wanted = flat_params.flatten(state)
    if wrong := sorted(
        k
        for k in wanted.keys() | arrays.keys()
        if k not in wanted or k not in arrays or wanted[k].shape != arrays[k].shape
    ):
        raise UserError(
            f"{path} is damaged: {len(wrong)} arrays are missing, unknown or of another shape "
            f"({wrong[0]}); make the head again with python -m grpo.reward_head"
        )
    flat = {name: jnp.asarray(value) for name, value in arrays.items()}
    return nnx.merge(graphdef, flat_params.unflatten(state, flat))


def _digest(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> str:
    contents: dict[str, memoryview | bytes] = {
        f"array {k}": np.ascontiguousarray(v).reshape(-1).view(np.uint8).data
        for k, v in arrays.items()
    }
    contents |= {f"metadata {k}": v.encode() for k, v in metadata.items()}
    return integrity.combined(
        (name, len(content), zlib.crc32(content)) for name, content in contents.items()
    )

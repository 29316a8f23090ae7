"""Reward guidance at sampling: Flow-NRG (Liu et al., arXiv 2501.13918).

A small transformer of Wan's kind predicts from noised latents, their noise level and the prompt
what the finished video will be worth; the sampler's velocity is shifted along the gradient of that
prediction. Trained by `python -m grpo.reward_head`, used by `python -m wan_jax.sample
--reward_head=... --reward_guidance=...` and by `grpo.evaluate`. The head starts from the video
model's first blocks, as the paper's, or is a small one with random weights.

The shift follows from tilting the model's distribution to p(x) exp(w r(x)). With x_s = (1 - s) x0 +
s e and v the mean of e - x0 given x_s, the score is -(x_s + (1 - s) v) / s, so v = -(x_s + s score)
/ (1 - s). Tilting adds w grad r to the score, to first order in w with r the expected reward given
x_s, and so -w s / (1 - s) grad r to v.
"""

import dataclasses
import json
import zlib
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from wan_jax.diffusion.guidance import TextBatch
from wan_jax.diffusion.solvers import per_sample
from wan_jax.errors import UserError
from wan_jax.models import params as P
from wan_jax.models.config import TransformerConfig
from wan_jax.models.transformer import WanTransformer3D
from wan_jax.storage import integrity
from wan_jax.storage.model_dir import ModelDir

Array = jax.Array
# of s / (1 - s), which is 1e6 in the first step, where noise says nothing of the reward
MOST = 10.0


def head_config(model: TransformerConfig, heads: int = 4, layers: int = 2) -> TransformerConfig:
    """A head for a model's latents and prompts: width 32 x heads, one output a patch element."""
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
    """With random weights, fp32."""
    return WanTransformer3D(config, dtype=jnp.float32, attention="chunked", rngs=nnx.Rngs(seed))


def from_model(
    model: TransformerConfig, state: nnx.State, layers: int, seed: int = 0
) -> WanTransformer3D:
    """A head of the model's embeddings and first blocks, fp32, with a new last layer. state: the
    model's arrays, also with adapters, which are left out. Raises ValueError where the model has
    fewer blocks.
    """
    if not 1 <= layers <= model.num_layers:
        raise ValueError(
            f"layers={layers} must be from 1 to {model.num_layers}, the model's blocks"
        )
    graphdef, fresh = nnx.split(
        make_head(dataclasses.replace(model, num_layers=layers, out_channels=1), seed)
    )
    theirs = P.flatten(state)

    def start(name: str, value: Array) -> Array:
        if name.startswith("proj_out/"):
            return value
        return jnp.asarray(
            theirs[name][:layers] if name.startswith("blocks/") else theirs[name], jnp.float32
        )

    return nnx.merge(
        graphdef, P.unflatten(fresh, {k: start(k, v) for k, v in P.flatten(fresh).items()})
    )


def predict(head: WanTransformer3D, latents: Array, timestep: Array, text: TextBatch) -> Array:
    """The expected reward, fp32 [B]. latents fp32 [B,F,H,W,C]; timestep scalar or [B], 0..1000."""
    t = jnp.broadcast_to(timestep, latents.shape[:1])
    out = head(latents, t, text.embeddings.astype(jnp.float32), text_padding=text.padding)
    return jnp.mean(out, axis=tuple(range(1, out.ndim)))


def shift(head: WanTransformer3D, latents: Array, sigma, timestep, text: TextBatch) -> Array:
    """min(s / (1 - s), 10) grad r, fp32 [B,F,H,W,C]: what guidance of weight 1 takes off the
    velocity. sigma scalar or [B].
    """
    # rows do not touch
    gradient = jax.grad(lambda x: jnp.sum(predict(head, x, timestep, text)))(latents)
    sigma = jnp.asarray(sigma, jnp.float32)
    return per_sample(jnp.minimum(sigma / jnp.maximum(1.0 - sigma, 1e-9), MOST), latents) * gradient


def guidance(
    path: str | None, weight: float, config: TransformerConfig, model: ModelDir | None = None
) -> Callable | None:
    """The `shift` of `pipeline.make_ode_step` by the head in the file, times `weight`; None without
    a file. Raises `UserError` as `load_head`.
    """
    if not path:
        return None
    head = load_head(path, config, model)
    return lambda x, *args: weight * shift(head, x, *args)


def save_head(path, head: WanTransformer3D, metadata: Mapping[str, str] | None = None) -> None:
    """One safetensors file, with its configuration, `metadata` and a digest of all in the header."""
    arrays = {k: np.asarray(v) for k, v in P.flatten(nnx.state(head, nnx.Param)).items()}
    values = {"config": json.dumps(dataclasses.asdict(head.config)), **(metadata or {})}
    save_file(arrays, path, metadata=values | {"digest": _digest(arrays, values)})


def load_head(path, config: TransformerConfig, model: ModelDir | None = None) -> WanTransformer3D:
    """config, model: what it is to guide. Raises `UserError` where the file is damaged, no head,
    one for another model's latents or prompts, or one that was trained on another model.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = dict(file.metadata() or {})
            arrays = {name: file.get_tensor(name) for name in file.keys()}
        digest = metadata.pop("digest", None)
        if digest is not None and digest != _digest(arrays, metadata):
            raise UserError(
                f"{path} is damaged: its values differ from what was written; make the head again "
                "with python -m grpo.reward_head"
            )
        values = json.loads(metadata["config"])
        own = TransformerConfig(
            **{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        )
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not a reward head ({error}): make one with python -m grpo.reward_head"
        ) from None
    for name in ("in_channels", "text_dim", "patch_size"):
        if getattr(own, name) != getattr(config, name):
            raise UserError(
                f"reward head {path} has {name}={getattr(own, name)}, this model has "
                f"{getattr(config, name)}: it was trained for another one"
            )
    if model is not None:
        model.check_same(
            metadata.get("wan_jax_model"), metadata.get("model", "another"), f"reward head {path}"
        )
    graphdef, state = nnx.split(nnx.eval_shape(lambda: make_head(own)))
    wanted = P.flatten(state)
    if wrong := sorted(
        k
        for k in wanted.keys() | arrays.keys()
        if k not in wanted or k not in arrays or wanted[k].shape != arrays[k].shape
    ):
        raise UserError(
            f"{path} is damaged: {len(wrong)} arrays are missing, unknown or of another shape "
            f"({wrong[0]}); make the head again with python -m grpo.reward_head"
        )
    return nnx.merge(
        graphdef, P.unflatten(state, {name: jnp.asarray(value) for name, value in arrays.items()})
    )


def _digest(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> str:
    parts = {
        f"array {k}": np.ascontiguousarray(v).reshape(-1).view(np.uint8) for k, v in arrays.items()
    }
    parts |= {f"metadata {k}": v.encode() for k, v in metadata.items()}
    return integrity.combined((name, len(part), zlib.crc32(part)) for name, part in parts.items())

"""Each published model's configuration at true width, cut to two blocks, against Diffusers."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert import key_table
from wan_jax import model_dir
from wan_jax import params as P
from wan_jax.config import TransformerConfig

MODELS = {"1.3B": dict(num_attention_heads=12, ffn_dim=8960), "14B and A14B": {},
          "TI2V-5B": dict(num_attention_heads=24, ffn_dim=14336, in_channels=48, out_channels=48)}
# What Diffusers keeps in fp32 under from_pretrained(torch_dtype=bfloat16).
KEPT = ("scale_shift_table", "time_embedder", "norm2")


def relative_error(a, b):
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parity
@pytest.mark.parametrize("name", MODELS)
def test_velocity_at_true_width(name):
    """fp32 to 1e-5; bf16 to 1e-2.

    Seen: 9e-7 in fp32; in bf16 5.8e-3, and our bf16 is 5.5e-3 from our fp32. The two programs round to 8 bits after
    sums taken in different orders, so they differ by about what bf16 itself costs, and the bar is twice that.
    """
    import diffusers
    import torch

    config = TransformerConfig(**MODELS[name], num_layers=2)
    torch.manual_seed(0)
    peer = diffusers.WanTransformer3DModel(num_layers=2, **MODELS[name]).eval()
    rng = np.random.default_rng(1)
    latents = rng.standard_normal((1, 2, 8, 12, config.in_channels)).astype(np.float32)
    text = rng.standard_normal((1, 512, 4096)).astype(np.float32)
    text[:, 40:] = 0
    timestep = 757
    # our tree shares torch's memory where no transposition is needed; nothing writes to it
    tensors = {k: v.numpy() for k, v in peer.state_dict().items()}
    shapes = {k: v.shape for k, v in P.flatten(model_dir.abstract("transformer", config)[1]).items()}
    flat = key_table.to_ours("transformer", tensors, shapes)

    def ours(dtype):
        graphdef, like = model_dir.abstract("transformer", config, dtype=dtype, attention="xla")
        state = P.unflatten(like, {k: jnp.asarray(flat[k]).astype(v.dtype) for k, v in P.flatten(like).items()})
        run = jax.jit(lambda s, *x: nnx.merge(graphdef, s)(*x, text_padding=472))
        return np.asarray(run(state, latents, jnp.full((1,), timestep), text[:, :40].astype(dtype)))

    def theirs(dtype):
        with torch.no_grad():
            out = peer(torch.from_numpy(latents.transpose(0, 4, 1, 2, 3).copy()).to(dtype), torch.tensor([timestep]),
                       torch.from_numpy(text).to(dtype), return_dict=False)[0]
        return out.float().numpy().transpose(0, 2, 3, 4, 1)

    exact, wanted = ours(jnp.float32), theirs(torch.float32)
    gc.collect()
    assert relative_error(exact, wanted) < 1e-5
    half = ours(jnp.bfloat16)
    flat.clear()
    tensors.clear()
    gc.collect()
    for key, parameter in peer.named_parameters():
        if not any(part in key.split(".") for part in KEPT):
            parameter.data = parameter.data.to(torch.bfloat16)
    wanted_half = theirs(torch.bfloat16)
    assert relative_error(half, wanted_half) < 1e-2
    assert relative_error(half, exact) < 2e-2

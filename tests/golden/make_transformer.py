"""Makes transformer.npz: velocities of Diffusers' `WanTransformer3DModel` for a small random
transformer.

    python tests/golden/make_transformer.py        # needs torch and diffusers

Stored: the config, the seed, the inputs and the outputs (fp32, CPU). The weights are not:
`random_weights` makes them again from the seed, with numpy alone.
"""

import json
import pathlib
from collections.abc import Mapping

import numpy as np

PATH = pathlib.Path(__file__).parent / "transformer.npz"
SEED = 11
CONFIG = dict(
    num_attention_heads=2,
    attention_head_dim=24,
    in_channels=16,
    out_channels=16,
    text_dim=20,
    freq_dim=32,
    ffn_dim=40,
    num_layers=3,
    patch_size=(1, 2, 2),
)


def random_weights(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    """State-dict key to fp32 tensor, drawn in key order; norm weights far from 1, every bias and
    table non-zero.
    """
    rng = np.random.default_rng(seed)
    weights = {}
    for key in sorted(shapes):
        value = rng.standard_normal(shapes[key])
        if "norm" in key and key.endswith("weight"):
            value = 1 + 0.3 * value
        elif len(shapes[key]) >= 2 and "table" not in key:
            value = value * np.prod(shapes[key][1:]) ** -0.5
        else:
            value = 0.3 * value
        weights[key] = value.astype(np.float32)
    return weights


def random_inputs(
    seed: int, frames: int, height: int, width: int, channels=16, text_rows=12, text_dim=20
):
    """latents [2,F,H,W,C], timesteps [2], text [2,St,text_dim] with zero rows after the 7th and the
    3rd.
    """
    rng = np.random.default_rng(seed)
    latents = rng.standard_normal((2, frames, height, width, channels)).astype(np.float32)
    text = rng.standard_normal((2, text_rows, text_dim)).astype(np.float32)
    text[0, 7:], text[1, 3:] = 0, 0
    return latents, np.array([999.0, 250.0], np.float32), text


def peer(config, seed: int = SEED):
    """Diffusers' model with `random_weights`, and the weights."""
    import diffusers
    import torch

    model = diffusers.WanTransformer3DModel(**config).eval()
    weights = random_weights({k: tuple(v.shape) for k, v in model.state_dict().items()}, seed)
    model.load_state_dict({k: torch.from_numpy(v) for k, v in weights.items()})
    return model, weights


def run(model, latents, timesteps, text) -> np.ndarray:
    """The peer's velocity on channels-last arrays."""
    import torch

    with torch.no_grad():
        out = model(
            torch.from_numpy(latents.transpose(0, 4, 1, 2, 3)),
            torch.from_numpy(timesteps),
            torch.from_numpy(text),
        ).sample
    return out.numpy().transpose(0, 2, 3, 4, 1)


def main():
    model, _ = peer(CONFIG)
    arrays = {}
    for name, grid in (("picture", (1, 6, 8)), ("clip", (3, 4, 6))):
        arrays[name] = run(model, *random_inputs(SEED, *grid))
    np.savez_compressed(PATH, config=json.dumps(CONFIG), seed=SEED, **arrays)


if __name__ == "__main__":
    main()

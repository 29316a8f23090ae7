"""Makes vae.npz and vae_22.npz: latents and videos of Diffusers' `AutoencoderKLWan` for a small
random VAE, the first built as Wan 2.1's, the second as 2.2's.

    python tests/golden/make_vae.py        # needs torch and diffusers

Stored: the config, the seed and the outputs (fp32, CPU). Weights and inputs are not:
`random_weights` and `random_inputs` make them again from the seed, with numpy alone.
"""

import json
import pathlib
from collections.abc import Mapping

import numpy as np

FOLDER = pathlib.Path(__file__).parent
SEED = 21
LATENT_FRAMES = {"picture": 1, "clip": 3}
CONFIG = dict(
    base_dim=12,
    z_dim=16,
    dim_mult=[1, 2, 4, 4],
    num_res_blocks=1,
    attn_scales=[],
    temperal_downsample=[False, True, True],
    dropout=0.0,
    latents_mean=[0.0] * 16,
    latents_std=[1.0] * 16,
)
CONFIG_22 = CONFIG | dict(
    base_dim=8,
    decoder_base_dim=12,
    z_dim=48,
    is_residual=True,
    in_channels=12,
    out_channels=12,
    patch_size=2,
    scale_factor_spatial=16,
    latents_mean=[0.0] * 48,
    latents_std=[1.0] * 48,
)
# file name: config, height, width
RECORDED = {"vae": (CONFIG, 16, 24), "vae_22": (CONFIG_22, 16, 32)}


def random_weights(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    """State-dict key to fp32 tensor, drawn in key order: gammas far from 1, biases from 0.

    Kernels keep the variance. The decoder's last convolution is small, so that its output mostly
    stays clear of the clamp to [-1, 1].
    """
    rng = np.random.default_rng(seed)
    weights = {}
    for key in sorted(shapes):
        value = rng.standard_normal(shapes[key])
        if key.endswith("gamma"):
            value = 1 + 0.3 * value
        elif key.endswith("bias"):
            value = 0.3 * value
        else:
            value = value * np.prod(shapes[key][1:]) ** -0.5
        if key.startswith("decoder.conv_out"):
            value = 0.8 * value
        weights[key] = value.astype(np.float32)
    return weights


def random_inputs(
    seed: int, frames: int, height: int, width: int, config: Mapping
) -> tuple[np.ndarray, np.ndarray]:
    """video [2,T,H,W,3] in [-1,1] and, independent of it, z [2,F,h,w,z] of `frames` latent frames."""
    rng = np.random.default_rng(seed)
    ft, fs = config.get("scale_factor_temporal", 4), config.get("scale_factor_spatial", 8)
    video = rng.uniform(-1, 1, (2, 1 + ft * (frames - 1), height, width, 3)).astype(np.float32)
    z = rng.standard_normal((2, frames, height // fs, width // fs, config["z_dim"])).astype(
        np.float32
    )
    return video, z


def peer(config: Mapping, seed: int = SEED):
    """Diffusers' model with `random_weights`, and the weights."""
    import diffusers
    import torch

    model = diffusers.AutoencoderKLWan(**config).eval()
    weights = random_weights({k: tuple(v.shape) for k, v in model.state_dict().items()}, seed)
    model.load_state_dict({k: torch.from_numpy(v) for k, v in weights.items()})
    return model, weights


def run(model, video, z) -> dict[str, np.ndarray]:
    """The peer's posterior of `video` and decoded `z`, channels-last: mean, logvar, video."""
    import torch

    def theirs(x):
        return torch.from_numpy(x.transpose(0, 4, 1, 2, 3))

    with torch.no_grad():
        posterior = model.encode(theirs(video)).latent_dist
        out = {
            "mean": posterior.mean,
            "logvar": posterior.logvar,
            "video": model.decode(theirs(z)).sample,
        }
    return {name: x.numpy().transpose(0, 2, 3, 4, 1) for name, x in out.items()}


def main():
    import diffusers
    import torch

    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__}
    for name, (config, height, width) in RECORDED.items():
        model, _ = peer(config)
        arrays = {}
        for case, frames in LATENT_FRAMES.items():
            outputs = run(model, *random_inputs(SEED, frames, height, width, config))
            arrays |= {f"{case}_{key}": x for key, x in outputs.items()}
        path = FOLDER / f"{name}.npz"
        np.savez_compressed(
            path, config=json.dumps(config), versions=json.dumps(versions), seed=SEED, **arrays
        )
        print(f"{path.name}: {path.stat().st_size} bytes, {versions}")


if __name__ == "__main__":
    main()

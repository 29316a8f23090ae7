"""Judges by OCR how well tiny-wan spells: its VAE's reconstructions and its own samples.

    python -m examples.tiny_wan.evaluate --model assets/tiny-wan --stage vae --picture sheet.png
    python -m examples.tiny_wan.evaluate --model assets/tiny-wan --stage sizes --sizes 64x128,96x192

Reads the Diffusers folder. The stage `vae` reads reconstructions of clean held-out signs; `model`
samples groups of held-out prompts, by the deterministic sampler and with noise as in training, and
prints the mean reward, the spread within groups and the histogram of the rewards. The stage `sizes`
does both at several frame sizes, with one set of prompts.
"""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import nnx

from examples.tiny_wan import prompts, signs, sizes
from examples.tiny_wan.folder import load_component, load_vae
from examples.tiny_wan.tokenise import tokenise
from wan_jax.diffusion import sde
from wan_jax.diffusion.solvers import make_solver
from wan_jax.models.config import TextEncoderConfig, TransformerConfig
from wan_jax.models.text_encoder import UMT5Encoder, encode
from wan_jax.models.transformer import WanTransformer3D

CHECKS: tuple[dict[str, Any], ...] = (  # arguments of `check_model`
    dict(steps=10),
    dict(steps=10, noise_level=0.7),
    dict(steps=20, frames=sizes.CLIP_FRAMES),
    dict(steps=20),
    dict(steps=10, guidance=3.0),
)
SIZE_CHECKS: tuple[dict[str, Any], ...] = (  # arguments of `check_model`, at each size
    dict(steps=10, guidance=2.0),
    dict(steps=10, noise_level=0.7),
    dict(steps=20, frames=sizes.CLIP_FRAMES),
)
CHARACTERS = 96  # room for a prompt
BASE_SIZE = sizes.HEIGHT, sizes.WIDTH


def contact_sheet(path, frames: np.ndarray, columns: int = 8):
    """Write frames uint8 [N, H, W, 3] as one PNG."""
    from PIL import Image

    n, h, w, _ = frames.shape
    rows = -(-n // columns)
    sheet = np.zeros((rows * (h + 2), columns * (w + 2), 3), np.uint8)
    for i, frame in enumerate(frames):
        y, x = divmod(i, columns)
        sheet[y * (h + 2) : y * (h + 2) + h, x * (w + 2) : x * (w + 2) + w] = frame
    Image.fromarray(sheet).save(path)


def to_uint8(video) -> np.ndarray:
    """Convert pixels from [-1, 1] to uint8."""
    return np.asarray(
        jnp.round((jnp.clip(video.astype(jnp.float32), -1, 1) + 1) * 127.5).astype(jnp.uint8)
    )


def read(pool, videos: np.ndarray, texts: list[str]) -> np.ndarray:
    """Return the OCR rewards [N] of uint8 videos [N, T, H, W, 3]."""
    return pool.submit(videos, [(text,) for text in texts]).result().values


def check_vae(folder, pool, frames: int, count: int = 64, size=BASE_SIZE) -> np.ndarray:
    """Print how well reconstructions read; return frames uint8 [16, H, W, 3] of 8 signs and theirs.
    size: (H, W) in pixels.
    """
    (graph, weights), atlas = load_vae(folder, jnp.float32), signs.build_atlas()

    @jax.jit
    def reconstruct(weights, key):
        vae = nnx.merge(graph, weights)
        content, sign = signs.sample(key, atlas, count, heldout=True, frames=frames, size=size)
        video = signs.render(atlas, sign, frames, size=size).astype(jnp.float32)
        return content.letters, video, vae.decode(vae.encode(video)[0])

    letters, video, out = reconstruct(weights, jax.random.key(5))
    texts = prompts.words(letters)
    real, back = (read(pool, to_uint8(v), texts) for v in (video, out))
    psnr = -10 * np.log10(np.mean((np.asarray(video - out) / 2) ** 2))
    print(
        f"VAE, {size[0]}x{size[1]}, {frames} frame(s), {count} clean held-out signs: originals read {real.mean():.3f}, "
        f"reconstructions {back.mean():.3f}, PSNR {psnr:.1f} dB"
    )
    return to_uint8(jnp.concatenate([video[:8], out[:8]]))[:, -1]


class Sampler:
    """Samples from the Diffusers folder of tiny-wan."""

    def __init__(self, folder, dtype=jnp.float32):
        folder = pathlib.Path(folder)
        vae = load_vae(folder / "vae", dtype)
        text = load_component(
            folder / "text_encoder",
            "text_encoder",
            TextEncoderConfig,
            lambda c: UMT5Encoder(c, dtype=dtype, rngs=nnx.Rngs(0)),
        )
        transformer = load_component(
            folder / "transformer",
            "transformer",
            TransformerConfig,
            lambda c: WanTransformer3D(c, dtype=dtype, rngs=nnx.Rngs(0)),
        )
        modules = tuple(nnx.merge(*parts) for parts in (vae, text, transformer))
        self.graph, self.weights = nnx.split(modules)

    def sample(self, chars, key, **options):
        """Return videos uint8 [B, T, H, W, 3] for prompts as ASCII codes [B, R]. options: of
        `sample_videos`.
        """
        return to_uint8(sample_videos(self.graph, self.weights, chars, key, **options))


@functools.partial(
    jax.jit,
    static_argnames=("graph", "size", "frames", "steps", "noise_level", "guidance"),
)
def sample_videos(
    graph,
    weights,
    chars,
    key,
    *,
    size=BASE_SIZE,
    frames=1,
    steps=10,
    noise_level=None,
    guidance=1.0,
):
    """Return videos [B, T, H, W, 3] in [-1, 1].

    graph, weights: VAE, text encoder and transformer. chars: ASCII codes [B, R]. size: (H, W) in
    pixels. noise_level: of the Flow-GRPO SDE; None: the deterministic Euler sampler.
    """
    schedule = make_solver("euler", steps, sizes.FLOW_SHIFT).schedule
    config = sde.SDEConfig(kind="flow_sde", noise_level=noise_level or 0.0)
    diffusion = np.zeros(steps, np.float32)
    if noise_level:
        diffusion = sde.diffusion_coefficient(config, schedule)
    vae, encoder, model = nnx.merge(graph, weights)
    text = encode(encoder, *tokenise(chars))
    empty = encode(encoder, *tokenise(jnp.zeros_like(chars)))
    pad = sizes.TEXT_ROWS - text.shape[1]
    shape = (chars.shape[0], (frames - 1) // 4 + 1, size[0] // 8, size[1] // 8, 16)

    def velocity(x, t):
        t = jnp.full((x.shape[0],), t)
        v = model(x, t, text, text_padding=pad)
        if guidance > 1:
            u = model(x, t, empty, text_padding=pad)
            v = u + guidance * (v - u)
        return v

    def step(x, i):
        s, s_next = jnp.asarray(schedule.sigmas)[i], jnp.asarray(schedule.sigmas)[i + 1]
        noise = jax.random.normal(jax.random.fold_in(key, i), shape)
        v = velocity(x, jnp.asarray(schedule.timesteps)[i])
        x, *_ = sde.sde_step(x, v, s, s_next, jnp.asarray(diffusion)[i], noise)
        return x, None

    x, _ = jax.lax.scan(
        step, jax.random.normal(jax.random.fold_in(key, 99), shape), jnp.arange(steps)
    )
    return vae.decode(vae.denormalise(x))


def check_model(folder, pool, *, groups=32, size=8, frames=1, frame_size=BASE_SIZE, **kwargs):
    """Print the rewards' statistics; return rewards [groups, size] and uint8 videos. frame_size: (H, W)
    in pixels.
    """
    sampler = Sampler(folder)
    content, _ = signs.sample(
        jax.random.key(77), signs.build_atlas(), groups, heldout=True, frames=frames
    )
    content = jax.tree.map(lambda x: jnp.repeat(x, size, axis=0), content)
    chars = prompts.ascii_codes(prompts.sentences(content), CHARACTERS)
    videos = sampler.sample(chars, jax.random.key(3), frames=frames, size=frame_size, **kwargs)
    rewards = read(pool, videos, prompts.words(content.letters)).reshape(groups, size)
    hist = np.histogram(rewards, bins=[0, 0.01, 0.25, 0.5, 0.75, 0.99, 1.01])[0]
    height, width = frame_size
    print(
        f"{folder}, {height}x{width}, {frames} frame(s), {kwargs}: reward {rewards.mean():.3f}, "
        f"std inside groups {rewards.std(1).mean():.3f}, groups with spread "
        f"{np.mean(rewards.std(1) > 0.02):.2f}, histogram {hist}",
        flush=True,
    )
    return rewards, videos


def judge_sizes(folders, frame_sizes, pool, *, count: int, checks=SIZE_CHECKS) -> dict:
    """Print how well the VAE reconstructs and how well models spell at frame sizes (H, W), on one set
    of held-out prompts. Return the rewards [groups, 8] by (folder, size, number of the check).

    folders: Diffusers folders with one VAE. pool: of OCR. count: pictures of each model, size and check;
    of clips a quarter. checks: arguments of `check_model`.
    """
    found = {}
    for size in frame_sizes:
        check_vae(pathlib.Path(folders[0]) / "vae", pool, 1, min(count, 64), size)
        for folder in folders:
            for i, options in enumerate(checks):
                groups = max(1, count // (32 if "frames" in options else 8))
                rewards, _ = check_model(folder, pool, groups=groups, frame_size=size, **options)
                found[str(folder), size, i] = rewards
    names = [", ".join(f"{key} {value}" for key, value in check.items()) for check in checks]
    print(f"mean OCR reward and standard error over prompts: {'; '.join(names)}")
    for folder, size in dict.fromkeys((folder, size) for folder, size, _ in found):
        means = [found[folder, size, i].mean(1) for i in range(len(checks))]
        cells = "; ".join(f"{m.mean():.3f} +- {m.std() / len(m) ** 0.5:.3f}" for m in means)
        print(f"  {size[0]}x{size[1]}  {folder}: {cells}", flush=True)
    return found


def main(_):
    from rewards.ocr.rules import OCRReward
    from rewards.pool import RewardPool

    root, workers = pathlib.Path(flags.FLAGS.model), flags.FLAGS.workers
    with RewardPool(OCRReward, workers=workers, mode="thread") as pool:
        sheets = []
        if flags.FLAGS.stage == "sizes":
            frame_sizes = sizes.parse(flags.FLAGS.sizes)
            judge_sizes([root], frame_sizes, pool, count=flags.FLAGS.count)
            return
        if flags.FLAGS.stage in ("vae", "all"):
            sheets += [check_vae(root / "vae", pool, frames) for frames in (1, sizes.CLIP_FRAMES)]
        if flags.FLAGS.stage in ("model", "all"):
            for kwargs in CHECKS:
                sheets.append(check_model(root, pool, **kwargs)[1][:64, -1])
                if flags.FLAGS.picture:
                    contact_sheet(flags.FLAGS.picture, np.concatenate(sheets))
        elif flags.FLAGS.picture:
            contact_sheet(flags.FLAGS.picture, np.concatenate(sheets))


if __name__ == "__main__":
    flags.DEFINE_string("model", None, "Diffusers folder", required=True)
    flags.DEFINE_enum("stage", "all", ["vae", "model", "all", "sizes"], "what to check")
    flags.DEFINE_string("sizes", "64x128", "frame sizes HEIGHTxWIDTH of the stage sizes")
    flags.DEFINE_integer("count", 256, "videos of each check of the stage sizes")
    flags.DEFINE_string("picture", None, "contact sheet to write")
    flags.DEFINE_integer("workers", 2, "OCR workers")
    app.run(main)

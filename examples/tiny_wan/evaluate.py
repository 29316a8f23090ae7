"""Judges by OCR how well tiny-wan spells: its VAE's reconstructions and its own samples.

    python -m examples.tiny_wan.evaluate --model assets/tiny-wan --stage vae --picture sheet.png

Reads the Diffusers folder. The stage `vae` reads reconstructions of clean held-out signs; `model`
samples groups of held-out prompts, by the deterministic sampler and with noise as in training, and
prints the mean reward, the spread within groups and the histogram of the rewards.
"""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import nnx

from examples.tiny_wan import prompts, signs, sizes
from examples.tiny_wan.folder import load_component, load_vae
from examples.tiny_wan.train_transformer import tokenise
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
CHARACTERS = 96  # room for a prompt


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


def check_vae(folder, pool, frames: int, count: int = 64) -> np.ndarray:
    """Print how well reconstructions read; return frames uint8 [16, H, W, 3] of 8 signs and theirs."""
    (graph, weights), atlas = load_vae(folder, jnp.float32), signs.build_atlas()

    @jax.jit
    def reconstruct(weights, key):
        vae = nnx.merge(graph, weights)
        content, sign = signs.sample(key, atlas, count, heldout=True, frames=frames)
        video = signs.render(atlas, sign, frames).astype(jnp.float32)
        return content.letters, video, vae.decode(vae.encode(video)[0])

    letters, video, out = reconstruct(weights, jax.random.key(5))
    texts = prompts.words(letters)
    real, back = (read(pool, to_uint8(v), texts) for v in (video, out))
    psnr = -10 * np.log10(np.mean((np.asarray(video - out) / 2) ** 2))
    print(
        f"VAE, {frames} frame(s), {count} clean held-out signs: originals read {real.mean():.3f}, "
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

    def sample(self, chars, key, *, frames=1, steps=10, noise_level=None, guidance=1.0):
        """Return videos uint8 [B, T, H, W, 3] for prompts as ASCII codes [B, R].

        noise_level: of the Flow-GRPO SDE; None: the deterministic Euler sampler.
        """
        solver = make_solver("euler", steps, sizes.FLOW_SHIFT)
        schedule = solver.schedule
        config = sde.SDEConfig(kind="flow_sde", noise_level=noise_level or 0.0)
        diffusion = np.zeros(steps, np.float32)
        if noise_level:
            diffusion = sde.diffusion_coefficient(config, schedule)

        @jax.jit
        def run(weights, chars, key):
            vae, encoder, model = nnx.merge(self.graph, weights)
            text = encode(encoder, *tokenise(chars))
            empty = encode(encoder, *tokenise(jnp.zeros_like(chars)))
            pad = sizes.TEXT_ROWS - text.shape[1]
            shape = (chars.shape[0], (frames - 1) // 4 + 1, sizes.HEIGHT // 8, sizes.WIDTH // 8, 16)

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

        return to_uint8(run(self.weights, chars, key))


def check_model(folder, pool, *, groups=32, size=8, frames=1, **kwargs):
    """Print the rewards' statistics; return rewards [groups, size] and uint8 videos."""
    sampler = Sampler(folder)
    content, _ = signs.sample(
        jax.random.key(77), signs.build_atlas(), groups, heldout=True, frames=frames
    )
    content = jax.tree.map(lambda x: jnp.repeat(x, size, axis=0), content)
    chars = prompts.ascii_codes(prompts.sentences(content), CHARACTERS)
    videos = sampler.sample(chars, jax.random.key(3), frames=frames, **kwargs)
    rewards = read(pool, videos, prompts.words(content.letters)).reshape(groups, size)
    hist = np.histogram(rewards, bins=[0, 0.01, 0.25, 0.5, 0.75, 0.99, 1.01])[0]
    print(
        f"model, {frames} frame(s), {kwargs}: reward {rewards.mean():.3f}, std inside groups "
        f"{rewards.std(1).mean():.3f}, groups with spread {np.mean(rewards.std(1) > 0.02):.2f}, "
        f"histogram {hist}",
        flush=True,
    )
    return rewards, videos


def main(_):
    from rewards.ocr.rules import OCRReward
    from rewards.pool import RewardPool

    root = pathlib.Path(flags.FLAGS.model)
    with RewardPool(OCRReward, workers=flags.FLAGS.workers, mode="thread") as pool:
        sheets = []
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
    flags.DEFINE_enum("stage", "all", ["vae", "model", "all"], "what to check")
    flags.DEFINE_string("picture", None, "contact sheet to write")
    flags.DEFINE_integer("workers", 2, "OCR workers")
    app.run(main)

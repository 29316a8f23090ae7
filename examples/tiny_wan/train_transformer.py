"""Trains the text encoder and the transformer of tiny-wan by flow matching on the VAE's latents.

    python -m examples.tiny_wan.train_transformer --vae assets/tiny-wan/vae --out assets/tiny-wan --seconds 900

`--sizes` trains at several frame sizes: every step has an equal share of its batch of each. `--judge`
completes the folder, samples held-out prompts at each size, and prints their OCR rewards beside those of
`--init`:

    python -m examples.tiny_wan.train_transformer --vae assets/tiny-wan/vae --init assets/tiny-wan \\
        --sizes 64x128,96x192 --learning_rate 0.016 --seconds 220 --judge 512 --out OUT

The latents of a pool of signs are computed once. Every step then draws single frames and clips from
the pool, a sigma (logit-normal, shifted by 3 as in sampling) and noise, and regresses velocity =
noise - latents. A tenth of the prompts is dropped, so that guidance works. The text encoder has an
auxiliary loss: for each character, which letter of the quoted text it is. Without it the model
learns to spell much later. Muon and Adam; the learning rate follows the clock; the weights written
are an exponential moving average.
"""

import functools
import pathlib
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import nnx

from examples.tiny_wan import evaluate, prompts, signs, sizes
from examples.tiny_wan.assemble import assemble
from examples.tiny_wan.folder import load_flat, load_vae, save, subtree
from examples.tiny_wan.optim import muon_or_adam
from examples.tiny_wan.tokenise import frame_text, tokenise
from wan_jax.command_line.flag_types import define_number
from wan_jax.command_line.limits import Range
from wan_jax.models import flat_params
from wan_jax.models.config import TextEncoderConfig, TransformerConfig, from_dict
from wan_jax.models.text_encoder import UMT5Encoder, encode
from wan_jax.models.transformer import WanTransformer3D

FLAGS = flags.FLAGS
DROPOUT, LETTERS = 0.1, 6
LONGEST = 76  # characters of the longest prompt, rounded up
EMA_DECAY = 0.998


def letter_classes(chars):
    """Return the place of each character in the quoted text, the target of the auxiliary loss.

    ASCII codes [B, R] -> [B, R + 2]: 0 outside the quotes, else 1 + LETTERS * line + index of the
    letter in its line.
    """
    chars = frame_text(chars)
    quote, space = chars == ord('"'), chars == ord(" ")
    inside = (jnp.cumsum(quote, 1) % 2 == 1) & ~quote
    line = jnp.cumsum(space & inside, 1)
    at = jnp.arange(chars.shape[1])
    start = jax.lax.cummax(jnp.where(quote | (space & inside), at, -1), axis=1)
    index = jnp.clip(at - start - 1, 0, LETTERS - 1)
    return jnp.where(inside & ~space, 1 + LETTERS * jnp.clip(line, 0, 1) + index, 0)


def make_pool(
    vae_dir: str, atlas, key, count: int, batch: int, *, frames: int, size: tuple[int, int]
):
    """Render `count` signs of `size` (H, W) in pixels and encode them.

    Returns:
      Normalised latents bf16 [count, F, H, W, C], and the prompts' ASCII codes uint8
      [count, LONGEST].
    """
    graph, weights = load_vae(vae_dir, jnp.bfloat16)

    @jax.jit
    def chunk(weights, key):
        vae = nnx.merge(graph, weights)
        content, sign = signs.sample(
            key, atlas, batch, frames=frames, noise=signs.NoiseMix(), size=size
        )
        video = signs.render(atlas, sign, frames, size=size).astype(jnp.bfloat16)
        latents = vae.normalise(vae.encode(video)[0]).astype(jnp.bfloat16)
        return weights, (latents, content)

    _, (latents, content) = jax.lax.scan(chunk, weights, jax.random.split(key, count // batch))
    latents, content = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (latents, content))
    chars = prompts.ascii_codes(prompts.sentences(content), LONGEST)
    return latents, jnp.asarray(chars)


def main(_):
    # 1 the model, whose head serves the auxiliary loss alone
    start = time.time()
    frame_sizes = sizes.parse(FLAGS.sizes)
    text_config = from_dict(TextEncoderConfig, sizes.TEXT_ENCODER)
    config = from_dict(TransformerConfig, sizes.TRANSFORMER)

    class Model(nnx.Module):
        def __init__(self, dtype, rngs):
            self.text_encoder = UMT5Encoder(text_config, dtype=dtype, rngs=rngs)
            self.transformer = WanTransformer3D(config, dtype=dtype, rngs=rngs)
            self.head = nnx.Param(jnp.zeros((text_config.d_model, 1 + 2 * LETTERS), dtype))

    flat = flat_params.flatten(nnx.split(Model(jnp.float32, nnx.Rngs(FLAGS.seed)))[1])
    flat["transformer/proj_out/kernel"] = flat["transformer/proj_out/kernel"] * 0.01
    if FLAGS.init:
        for name in ("transformer", "text_encoder"):
            shapes = {k: v.shape for k, v in subtree(flat, name).items()}
            for path, value in load_flat(pathlib.Path(FLAGS.init) / name, name, shapes).items():
                flat[f"{name}/{path}"] = jnp.asarray(value, jnp.float32)
    graphdef, like = nnx.split(nnx.eval_shape(lambda: Model(jnp.bfloat16, nnx.Rngs(0))))
    dtypes = {k: v.dtype for k, v in flat_params.flatten(like).items()}
    print(
        f"transformer and text encoder: {sum(v.size for v in flat.values()):,} parameters",
        flush=True,
    )
    optimiser = muon_or_adam(flat, FLAGS.adam_scale)
    opt_state = optimiser.init(flat)

    # 2 the pools of signs: single frames and clips of each size
    key, atlas = jax.random.key(FLAGS.seed + 7), signs.build_atlas()
    pools, batches = [], []
    for number, size in enumerate(frame_sizes):
        for kind, (count, batch, chunk, frames) in enumerate(
            (
                (FLAGS.pool, FLAGS.batch, 1000, 1),
                (FLAGS.pool_clips, FLAGS.clips, 100, sizes.CLIP_FRAMES),
            )
        ):
            count //= len(frame_sizes)
            pool_key = jax.random.fold_in(key, 1 + kind)
            pool_key = jax.random.fold_in(pool_key, number) if number else pool_key
            chunk = min(chunk, count)
            pools.append(
                make_pool(FLAGS.vae, atlas, pool_key, count, chunk, frames=frames, size=size)
            )
            batches.append(max(1, batch // len(frame_sizes)))
    jax.block_until_ready(pools)
    print(
        f"{time.time() - start:6.0f} s  pool of {sum(len(x) for x, _ in pools[::2]):,} frames and "
        f"{sum(len(x) for x, _ in pools[1::2]):,} clips",
        flush=True,
    )

    # 3 the training step
    def flow_loss(model, latents, chars, key):
        """Flow-matching loss and auxiliary loss of one batch from the pool, fp32 scalars."""
        k1, k2, k3 = jax.random.split(key, 3)
        b = latents.shape[0]
        chars = jnp.where(jax.random.uniform(k1, (b, 1)) < DROPOUT, 0, chars)
        ids, mask = tokenise(chars)
        text = encode(model.text_encoder, ids, mask)
        logits = (text @ model.head[...]).astype(jnp.float32)
        picked = jnp.take_along_axis(
            jax.nn.log_softmax(logits), letter_classes(chars)[..., None], -1
        )[..., 0]
        aux = -(picked * mask).sum() / mask.sum()
        u = jax.nn.sigmoid(jax.random.normal(k2, (b,)))
        sigma = (sizes.FLOW_SHIFT * u / (1 + (sizes.FLOW_SHIFT - 1) * u))[:, None, None, None, None]
        noise = jax.random.normal(k3, latents.shape)
        x = (1 - sigma) * latents.astype(jnp.float32) + sigma * noise
        v = model.transformer(
            x, 1000 * sigma.reshape(b), text, text_padding=sizes.TEXT_ROWS - text.shape[1]
        )
        return jnp.mean((v - (noise - latents.astype(jnp.float32))) ** 2), aux

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def train(flat, opt_state, ema, pools, key, lr):
        def step(carry, key):
            flat, opt_state, ema = carry

            def total(flat):
                model = nnx.merge(
                    graphdef,
                    flat_params.unflatten(like, {k: v.astype(dtypes[k]) for k, v in flat.items()}),
                )
                losses = []
                for i, (pool, batch) in enumerate(zip(pools, batches)):
                    k1, k2 = jax.random.split(jax.random.fold_in(key, i))
                    index = jax.random.randint(k1, (batch,), 0, pool[0].shape[0])
                    losses.append(flow_loss(model, pool[0][index], pool[1][index], k2))
                single, clip = (
                    jnp.stack([loss for loss, _ in losses[kind::2]]) for kind in range(2)
                )
                aux = jnp.stack([aux for _, aux in losses[::2]]).mean()
                loss = single.mean() + 0.4 * clip.mean() + FLAGS.aux * aux
                return loss, jnp.concatenate([single, clip, aux[None]])

            (_, logs), grads = jax.value_and_grad(total, has_aux=True)(flat)
            updates, opt_state = optimiser.update(grads, opt_state, flat)
            flat = jax.tree.map(lambda p, u: p - lr * u, flat, updates)
            ema = jax.tree.map(lambda e, p: EMA_DECAY * e + (1 - EMA_DECAY) * p, ema, flat)
            return (flat, opt_state, ema), logs

        carry, logs = jax.lax.scan(step, (flat, opt_state, ema), jax.random.split(key, FLAGS.inner))
        return *carry, logs.mean(0)

    # 4 train until the time is over
    steps, logs = 0, np.full(2 * len(frame_sizes) + 1, np.nan)
    flat, ema = jax.tree.map(jnp.copy, (flat, flat))
    begun = time.time()
    printed = begun - start - 20
    while (elapsed := time.time() - begun) < FLAGS.seconds or not steps:
        progress = elapsed / FLAGS.seconds
        lr = (
            FLAGS.learning_rate
            * min(1.0, (steps + FLAGS.inner) / 400)
            * max(FLAGS.final_rate, 1 - progress)
        )
        draw = jax.random.fold_in(key, 10 + steps)
        flat, opt_state, ema, logs = train(flat, opt_state, ema, pools, draw, lr)
        logs = np.asarray(logs)
        steps += FLAGS.inner
        if time.time() - start - printed > 15:
            printed = time.time() - start
            single, clip = (
                " ".join(f"{loss:.4f}" for loss in losses) for losses in np.split(logs[:-1], 2)
            )
            print(
                f"{printed:6.0f} s  step {steps:6d}  lr {lr:.1e}  single {single}  clip {clip}  "
                f"letters {logs[-1]:.4f}",
                flush=True,
            )
    # 5 write the averaged weights
    out = pathlib.Path(FLAGS.out)
    for name, settings, file in (
        ("transformer", sizes.TRANSFORMER, "diffusion_pytorch_model.safetensors"),
        ("text_encoder", sizes.TEXT_ENCODER, "model.safetensors"),
    ):
        save(name, subtree(ema, name), settings, out / name, file)
    print(
        f"transformer: {steps} steps in {time.time() - start:.0f} s, loss {logs[0]:.4f}, written "
        f"to {out}",
        flush=True,
    )
    # 6 judge them
    if FLAGS.judge:
        from rewards.ocr.rules import OCRReward
        from rewards.pool import RewardPool

        assemble(out)
        shutil.copytree(FLAGS.vae, out / "vae", dirs_exist_ok=True)
        folders = [out] if FLAGS.init is None else [FLAGS.init, out]
        with RewardPool(OCRReward, workers=FLAGS.workers, mode="thread") as pool:
            evaluate.judge_sizes(folders, frame_sizes, pool, count=FLAGS.judge)


if __name__ == "__main__":
    flags.DEFINE_string("vae", None, "folder of the trained VAE", required=True)
    flags.DEFINE_string(
        "out", None, "folder to write transformer/ and text_encoder/ into", required=True
    )
    define_number(
        "seconds",
        900,
        "time of the optimisation, its compilation included; the pool is made before",
        Range(0, above=True),
    )
    flags.DEFINE_float("learning_rate", 0.02, "peak rate of Muon")
    flags.DEFINE_float("adam_scale", 0.1, "Adam's rate as a share of Muon's")
    flags.DEFINE_integer("pool", 400_000, "single frames in the pool")
    flags.DEFINE_integer("pool_clips", 20_000, "clips in the pool")
    flags.DEFINE_integer("batch", 1024, "single frames a step")
    flags.DEFINE_integer("clips", 96, "clips a step")
    flags.DEFINE_float("aux", 0.1, "weight of the auxiliary loss")
    flags.DEFINE_integer("seed", 0, "seed")
    flags.DEFINE_string("init", None, "folder with transformer/ and text_encoder/ to start from")
    flags.DEFINE_float("final_rate", 0.0, "the rate's share left at the end of its linear decay")
    flags.DEFINE_integer("inner", 50, "optimiser steps a call")
    flags.DEFINE_string(
        "sizes", "64x128", "frame sizes HEIGHTxWIDTH; batches and pools are divided"
    )
    flags.DEFINE_integer("judge", 0, "pictures of held-out prompts to judge at each size; 0: none")
    flags.DEFINE_integer("workers", 8, "OCR workers of the judgement")
    app.run(main)

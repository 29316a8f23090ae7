"""Trains the causal VAE of tiny-wan on rendered signs: single frames first, then also clips.

    python -m examples.tiny_wan.train_vae --out assets/tiny-wan/vae --seconds 300

Single frames use 2-D convolutions with the last temporal tap (`wan_jax/models/vae.py`), so most
steps are cheap. The other taps start at zero and the temporal convolutions as the identity, so a
clip is at first coded frame by frame. The loss is L1 + L2, in which edges, hence letters, have seven
times the weight, plus 1e-6 KL. AdamW; the learning rate follows a cosine over the time budget.
"""

import functools
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from flax import nnx

from examples.tiny_wan import signs, sizes
from examples.tiny_wan.folder import save
from wan_jax.models import flat_params
from wan_jax.models.config import VAEConfig, from_dict
from wan_jax.models.vae import AutoencoderKLWan

FLAGS = flags.FLAGS
CLIP_PHASE = 0.55  # the share of the time after which clips join
KL_WEIGHT = 1e-6


def temporal_identity(flat: dict) -> dict:
    """Zero all but the last temporal tap of 3x3x3 kernels; make temporal resamplers copy frames."""
    flat = dict(flat)
    for path, w in flat.items():
        if not path.endswith("kernel") or w.ndim != 5 or w.shape[0] == 1:
            continue
        if "time_conv" in path:
            n_in, n_out = w.shape[-2:]
            flat[path] = (
                jnp.zeros_like(w).at[-1, 0, 0].set(jnp.tile(jnp.eye(n_in), (1, n_out // n_in)))
            )
        else:
            flat[path] = w.at[:-1].set(0)
    return flat


def loss_fn(flat, graphdef, like, video, key):
    """Return the loss and its reconstruction part, fp32 scalars; video [B, T, H, W, 3] in [-1, 1]."""
    model = nnx.merge(
        graphdef, flat_params.unflatten(like, {k: v.astype(jnp.bfloat16) for k, v in flat.items()})
    )
    mean, logvar = model.encode(video.astype(jnp.bfloat16))
    mean, logvar = mean.astype(jnp.float32), logvar.astype(jnp.float32)
    z = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
    out = model.decoder(model.post_quant_conv(z.astype(jnp.bfloat16))).astype(jnp.float32)
    dy = jnp.abs(jnp.diff(video, axis=2, append=video[:, :, -1:])).sum(-1)
    dx = jnp.abs(jnp.diff(video, axis=3, append=video[:, :, :, -1:])).sum(-1)
    edge = jax.lax.reduce_window(
        (dx + dy > 0.2).astype(jnp.float32), 0.0, jax.lax.max, (1, 1, 5, 5), (1,) * 4, "SAME"
    )
    weight = (1 + 6 * edge)[..., None]
    error = jnp.abs(out - video)
    rec = ((error + error**2) * weight).sum() / (weight.sum() * 3)
    kl = 0.5 * (mean**2 + jnp.exp(logvar) - 1 - logvar).sum((1, 2, 3, 4)).mean()
    return rec + KL_WEIGHT * kl, rec


def main(_):
    # 1 the model
    start = time.time()
    config = from_dict(VAEConfig, sizes.VAE)
    model = AutoencoderKLWan(config, dtype=jnp.float32, rngs=nnx.Rngs(FLAGS.seed))
    flat = temporal_identity(flat_params.flatten(nnx.split(model)[1]))
    graphdef, like = nnx.split(
        nnx.eval_shape(lambda: AutoencoderKLWan(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    )
    print(f"VAE: {sum(v.size for v in flat.values()):,} parameters", flush=True)
    optimiser = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b2=0.99),
        optax.add_decayed_weights(0.01),
    )
    opt_state = optimiser.init(flat)
    atlas = signs.build_atlas()

    # 2 the training step
    def render(key, batch, frames):
        _, sign = signs.sample(key, atlas, batch, frames=frames, noise=signs.NoiseMix())
        return signs.render(atlas, sign, frames).astype(jnp.float32)

    @functools.partial(jax.jit, static_argnames="clips", donate_argnums=(0, 1))
    def train(flat, opt_state, key, lr, clips):
        def step(carry, key):
            flat, opt_state = carry
            k1, k2, k3, k4 = jax.random.split(key, 4)

            def total(flat):
                loss, rec = loss_fn(flat, graphdef, like, render(k1, FLAGS.batch, 1), k2)
                if clips:
                    more, rec2 = loss_fn(
                        flat, graphdef, like, render(k3, clips, sizes.CLIP_FRAMES), k4
                    )
                    loss, rec = loss + more, (rec + rec2) / 2
                return loss, rec

            (_, rec), grads = jax.value_and_grad(total, has_aux=True)(flat)
            updates, opt_state = optimiser.update(grads, opt_state, flat)
            return (jax.tree.map(lambda p, u: p - lr * u, flat, updates), opt_state), rec

        (flat, opt_state), recs = jax.lax.scan(
            step, (flat, opt_state), jax.random.split(key, FLAGS.inner)
        )
        return flat, opt_state, recs.mean()

    # 3 train until the time is over; clips join after `CLIP_PHASE`
    key, steps, printed = jax.random.key(FLAGS.seed + 1), 0, 0.0
    while (elapsed := time.time() - start) < FLAGS.seconds or not steps:
        progress = elapsed / FLAGS.seconds
        lr = (
            FLAGS.learning_rate
            * min(1, (steps + FLAGS.inner) / 200)
            * (0.5 * (1 + np.cos(np.pi * progress)) + 1e-3)
        )
        clips = FLAGS.clips if progress > CLIP_PHASE else 0
        flat, opt_state, rec = train(
            flat, opt_state, jax.random.fold_in(key, steps), lr, clips=clips
        )
        rec = float(rec)
        steps += FLAGS.inner
        if elapsed - printed > 10:
            printed = elapsed
            print(
                f"{elapsed:6.0f} s  step {steps:6d}  lr {lr:.1e}  clips {clips}  reconstruction "
                f"{rec:.4f}",
                flush=True,
            )

    # 4 write the weights, and the latents' mean and deviation, which normalise the transformer's
    flat = {k: v.astype(jnp.bfloat16) for k, v in flat.items()}
    encode = jax.jit(
        lambda video: nnx.merge(graphdef, flat_params.unflatten(like, flat)).encode(
            video.astype(jnp.bfloat16)
        )[0]
    )
    z = [
        np.asarray(encode(render(jax.random.fold_in(key, 2**30 + i), 256, 1)), np.float32)
        for i in range(8)
    ]
    z += [
        np.asarray(
            encode(render(jax.random.fold_in(key, 2**30 + 100 + i), 32, sizes.CLIP_FRAMES)),
            np.float32,
        )
        for i in range(4)
    ]
    z = np.concatenate([v.reshape(-1, config.z_dim) for v in z])
    values = dict(
        sizes.VAE,
        latents_mean=[round(float(v), 4) for v in z.mean(0)],
        latents_std=[round(float(v), 4) for v in z.std(0)],
    )
    save("vae", flat, values, pathlib.Path(FLAGS.out))
    print(
        f"VAE: {steps} steps in {time.time() - start:.0f} s, reconstruction {rec:.4f}, written to "
        f"{FLAGS.out}"
    )


if __name__ == "__main__":
    flags.DEFINE_string("out", None, "folder to write (config.json and safetensors)", required=True)
    flags.DEFINE_float("seconds", 300, "time budget of the optimisation, compilation included")
    flags.DEFINE_float("learning_rate", 2e-3, "peak learning rate")
    flags.DEFINE_integer("batch", 128, "single frames a step")
    flags.DEFINE_integer("clips", 8, "clips a step in the second phase")
    flags.DEFINE_integer("seed", 0, "seed")
    flags.DEFINE_integer("inner", 20, "optimiser steps a call")
    app.run(main)

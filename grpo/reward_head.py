"""Trains a reward head (`wan_jax.inference.reward_guidance`) on videos that a model makes for its
training prompts.

    python -m grpo.reward_head --config=configs/tiny_ocr.py [--checkpoint=runs/tiny_ocr]
    --out=heads/tiny.safetensors python -m wan_jax.sample --model models/tiny-wan --reward_head
    heads/tiny.safetensors --reward_guidance 10 ...

Samples as the recipe evaluates (`eval.solver`, `eval.steps`, `eval.guidance`), scores as it trains
(`reward.*`), and fits the head to the rewards of noised latents by least squares. One video in
eight is held out; how much better the head foretells its reward than the mean does is printed by
noise level: guidance is worth trying where it does at all. Measures of quality, which count against
a first evaluation in training, are left out.
"""

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from flax import nnx
from ml_collections import config_flags
from tqdm import tqdm

from grpo.data.prompts import load_prompts
from grpo.random_streams import Stream
from grpo.rollout import initial_noise
from grpo.run import RunSpec
from grpo.scoring import reward_combination
from grpo.scoring.scores import gather_scores, open_pool, submit, targets_check
from grpo.settings import parse
from grpo.settings.reference import FLAG_HELP
from rewards.ocr.targets import parse_targets
from wan_jax.command_line import cli
from wan_jax.command_line.flag_types import define_number, define_path
from wan_jax.command_line.limits import Range
from wan_jax.diffusion.experts import per_guidance
from wan_jax.diffusion.guidance import TextBatch
from wan_jax.diffusion.solvers import per_sample
from wan_jax.distributed import sharding as sharding_lib
from wan_jax.errors import UserError
from wan_jax.inference import pipeline
from wan_jax.inference.reward_guidance import from_model, head_config, make_head, predict, save_head
from wan_jax.models import presets
from wan_jax.models.transformer import WanTransformer3D
from wan_jax.storage import model_dir
from wan_jax.storage.trained_weights import load_transformers

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)  # noise levels that are reported
HELD_OUT = 8  # one video in so many


def noised(key, x0: jax.Array, sigma) -> jax.Array:
    """x_s = (1 - s) x0 + s e; sigma scalar or [B]."""
    s = per_sample(sigma, x0)
    return (1 - s) * x0 + s * jax.random.normal(key, x0.shape, jnp.float32)


def fit(
    head: WanTransformer3D,
    latents: np.ndarray,
    text: Sequence[np.ndarray],
    padding: int,
    rewards: np.ndarray,
    *,
    updates: int,
    batch: int,
    rate: float,
    seed: int,
    progress=lambda x: x,
) -> WanTransformer3D:
    """The head after `updates` of AdamW on mean((predict(x_s) - r)^2), s uniform, noise fresh.

    latents fp32 [N,F,H,W,C], text [N,St,text_dim], rewards [N]. A function of the seed.
    """
    graphdef, params = nnx.split(head)
    # the first update takes them; the head's may be the model's own
    params = jax.tree.map(jnp.copy, params)
    optimiser = optax.adamw(optax.cosine_decay_schedule(rate, updates))
    key, rng = jax.random.key(seed), Stream.REWARD_HEAD.generator(seed)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params, opt, i, x0, words, target):
        level, noise = jax.random.split(jax.random.fold_in(key, i))
        sigma = jax.random.uniform(level, target.shape)

        def loss(params):
            found = predict(
                nnx.merge(graphdef, params),
                noised(noise, x0, sigma),
                1000 * sigma,
                TextBatch(words, words[0], padding),
            )
            return jnp.mean((found - target) ** 2)

        changes, opt = optimiser.update(jax.grad(loss)(params), opt, params)
        return optax.apply_updates(params, changes), opt

    opt = optimiser.init(params)
    for i in progress(range(updates)):
        rows = rng.choice(len(rewards), batch, replace=len(rewards) < batch)
        params, opt = update(
            params, opt, i, latents[rows], text[rows], rewards[rows].astype(np.float32)
        )
    return nnx.merge(graphdef, params)


def explained(
    head: WanTransformer3D,
    latents: np.ndarray,
    text: np.ndarray,
    padding: int,
    rewards: np.ndarray,
    batch: int,
    mean: float,
) -> dict[float, float]:
    """By noise level, the share of the rewards' spread around `mean` that the head foretells: 1 -
    its squared error over the mean's. 0: as good as the mean; below 0: worse.
    """
    run = nnx.jit(
        lambda head, x, t, words: predict(head, x, t, TextBatch(words, words[0], padding))
    )
    shares = {}
    for level in LEVELS:
        x = noised(jax.random.key(1), jnp.asarray(latents), level)
        rows = [
            np.arange(first, first + batch) % len(rewards)
            for first in range(0, len(rewards), batch)
        ]
        found = np.concatenate([run(head, x[r], 1000 * level, text[r]) for r in rows])[
            : len(rewards)
        ]
        shares[level] = 1 - float(
            np.sum((found - rewards) ** 2) / max(np.sum((rewards - mean) ** 2), 1e-12)
        )
    return shares


@dataclasses.dataclass(frozen=True)
class Examples:
    """N videos that were sampled and could be scored, in a random order of their prompts."""

    latents: np.ndarray  # fp32 [N, F, H, W, C]
    text: np.ndarray  # [N, St, text_dim]
    padding: int  # zero rows beyond St
    rewards: np.ndarray  # [N]


def collect(spec: RunSpec, model: model_dir.ModelDir, weights: tuple, count: int, bar) -> Examples:
    """Samples and scores `count` videos, whole batches. weights: of `load_transformers`. Raises
    `UserError` where too few of them have different rewards.
    """
    c, s, mesh, solver = spec.recipe, spec.settings, spec.mesh, spec.solver
    prompts = load_prompts(c.prompts.train, parse_targets, check=targets_check(c.reward))
    order = Stream.REWARD_HEAD.generator(c.seed).permutation(len(prompts))
    chosen = np.resize(order, count)  # every prompt as often as any other
    print(f"{count} videos of {min(count, len(prompts))} prompts", flush=True)
    table = pipeline.embed_prompts(
        model,
        prompts.prompts,
        c.prompts.negative,
        dtype=s.dtype,
        cache=True,
        progress=functools.partial(bar, desc="prompts"),
    )
    vae_graph, vae_state = pipeline.load_vae(model, mesh)
    decode = pipeline.make_decoder(vae_graph)
    graph, arrays = weights
    steps = per_guidance(
        functools.partial(pipeline.make_ode_step, functools.partial(nnx.merge, graph), solver),
        spec.eval_guidance,
    )
    replicated, sharded = sharding_lib.replicated(mesh), sharding_lib.batch_sharding(mesh)
    rows = np.arange(count, dtype=np.int32).reshape(-1, c.sample.batch_size)
    batches = [
        (
            initial_noise(jax.random.key(c.seed), sharding_lib.place(r, sharded), spec.shape),
            table.batch(chosen[r], sharded, replicated),
        )
        for r in rows
    ]
    kept, pending = [], []
    with open_pool(c.reward, s.weights) as pool:
        latents = pipeline.sample_ode(
            steps,
            lambda expert: (arrays(expert),),
            spec.eval_segments,
            solver,
            batches,
        )
        for r, x in bar(zip(rows, latents), total=len(rows), desc="videos"):
            kept.append(np.asarray(x))
            pending.append(
                submit(pool, r, decode(vae_state, x)(), [prompts.targets[p] for p in chosen[r]])
            )
        scores = gather_scores(pending, count)
    own = {reward_combination.MAIN: scores.values} | {
        k: v for k, v in scores.parts.items() if k not in reward_combination.BAD_SIDE
    }
    rewards = reward_combination.weighted_sum(
        {k: own[k] for k, w in s.weights.items() if w and k in own}, s.weights
    )
    good = np.flatnonzero(np.isfinite(rewards))
    if len(good) < 2 * HELD_OUT or np.ptp(rewards[good]) == 0:
        raise UserError(
            f"{len(good)} of {count} videos have a reward, {np.unique(rewards[good]).size} "
            "different ones: too few to learn from; raise --videos, or use other prompts"
            + (f". {scores.failures} have no score: {scores.why()}" if scores.failures else "")
        )
    return Examples(
        np.concatenate(kept)[good],
        table.padded([table.prompts[p] for p in chosen[good]]),
        pipeline.TEXT_ROWS - table.rows,
        rewards[good],
    )


def train(
    head: WanTransformer3D, data: Examples, batch: int, **kwargs
) -> tuple[WanTransformer3D, dict[float, float]]:
    """(the head fitted to seven videos in eight, what it foretells of the others by noise level).
    kwargs: of `fit`.
    """
    out = np.arange(len(data.rewards)) % HELD_OUT == 0
    head = fit(
        head,
        data.latents[~out],
        data.text[~out],
        data.padding,
        data.rewards[~out],
        batch=batch,
        **kwargs,
    )
    return head, explained(
        head,
        data.latents[out],
        data.text[out],
        data.padding,
        data.rewards[out],
        batch,
        data.rewards[~out].mean(),
    )


def main(_):
    f = flags.FLAGS
    config = f["config"].value
    config.run_dir = config.run_dir or str(pathlib.Path(f.out).parent)
    c = parse.recipe_from_config(config)
    s = parse.settings_of(c)
    if pathlib.Path(f.out).suffix != ".safetensors":
        raise UserError(f"--out {f.out}: the file's name must end in .safetensors")
    if pathlib.Path(f.out).is_dir():
        raise UserError(f"--out {f.out} is a folder; give the name of a file in it")
    pathlib.Path(f.out).parent.mkdir(parents=True, exist_ok=True)
    if jax.process_count() > 1:
        raise UserError("grpo.reward_head runs in one process")
    cli.enable_compilation_cache()
    with cli.user_input():
        model = model_dir.open_model(c.model.path)
        spec = RunSpec.make(c, s, presets.of_folder(model), training=False)
        config, size = spec.preset.transformer, c.sample.batch_size
        if f.layers > config.num_layers:
            raise ValueError(
                f"--layers={f.layers}: the model has {config.num_layers} blocks; 0 makes a small "
                "head of its own"
            )
    print(spec.placed, flush=True)
    bar = functools.partial(tqdm, leave=False, dynamic_ncols=True, disable=not sys.stderr.isatty())
    weights = load_transformers(
        model, f.checkpoint, s.dtype, spec.backend, spec.mesh, c.model.offload
    )
    data = collect(spec, model, weights, -(-f.videos // size) * size, bar)
    if f.layers:  # of two experts that of low noise, where there is most to be seen
        head = from_model(config, weights[1](len(model.experts) - 1), f.layers, c.seed)
    else:
        head = make_head(head_config(config), c.seed)
    del weights
    head, shares = train(
        head,
        data,
        f.batch,
        updates=f.updates,
        rate=f.learning_rate,
        seed=c.seed,
        progress=functools.partial(bar, desc="updates"),
    )
    save_head(f.out, head, {"model": c.model.path, **model.metadata})
    print(
        f"mean reward {data.rewards.mean():.3f}; held-out spread explained at noise level "
        + ", ".join(f"{level:g}: {share:.2f}" for level, share in shares.items()),
        f.out,
        sep="\n",
    )


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, FLAG_HELP, lock_config=True)
    define_path(
        "checkpoint",
        "run folder of grpo.train, or one of its checkpoints/<epoch>; None: the model itself",
    )
    define_path("out", "file to write, .safetensors", required=True)
    flags.DEFINE_integer(
        "layers",
        4,
        "of the model's first blocks, from which the head starts; 0: a small transformer "
        "with random weights",
        lower_bound=0,
    )
    flags.DEFINE_integer(
        "videos", 512, "videos to sample, rounded up to whole batches", lower_bound=16
    )
    flags.DEFINE_integer("updates", 2000, "of the head", lower_bound=1)
    flags.DEFINE_integer("batch", 32, "videos of one update", lower_bound=1)
    define_number(
        "learning_rate",
        3e-4,
        "of AdamW, falling to 0 as a cosine",
        Range(0, 1, above=True, below=True),
    )
    flags.mark_flag_as_required("config")
    cli.run(main)

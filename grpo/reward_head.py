"""Trains a reward head (`wan_jax.inference.reward_guidance`) on videos that a model makes for its
training prompts.

    python -m grpo.reward_head --config=configs/tiny_ocr.py [--checkpoint=runs/tiny_ocr] \\
        --out=heads/tiny.safetensors
    python -m wan_jax.sample --model models/tiny-wan --reward_head heads/tiny.safetensors \\
        --reward_guidance 10 ...

It samples as the recipe evaluates (`eval.solver`, `eval.steps`, `eval.guidance`), scores as the recipe
trains (`reward.*`), and fits the head to the rewards of noised latents by least squares. One video in
eight is held out. For each noise level the command prints how much better than the mean the head
predicts their rewards; guidance is only worth trying where this is above 0. Measures of quality, which
training compares with a first evaluation, are left out.
"""

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from flax import nnx
from ml_collections import config_flags
from tqdm import tqdm

from grpo.learning.head_guidance import fit_error, noised
from grpo.random_streams import Stream
from grpo.rollout import initial_noise
from grpo.run import RunSpec, open_model
from grpo.scoring import reward_combination
from grpo.scoring.reward_pool import open_pool
from grpo.scoring.scored_prompts import for_rewards, fps_of, load_scored_prompts
from grpo.scoring.scores import GatheredScores, gather_scores, submit
from grpo.settings import parse
from grpo.settings.reference import FLAG_HELP
from wan_jax.command_line import cli
from wan_jax.command_line.flag_types import define_number, define_path
from wan_jax.command_line.limits import Range
from wan_jax.diffusion.guidance import TextBatch
from wan_jax.distributed import sharding as sharding_lib
from wan_jax.errors import UserError
from wan_jax.inference import pipeline
from wan_jax.inference.reward_guidance import from_model, head_config, make_head, predict, save_head
from wan_jax.models import precision, presets
from wan_jax.models.transformer import WanTransformer3D
from wan_jax.storage import model_dir
from wan_jax.storage.trained_weights import load_transformers

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)  # noise levels that are reported
HELD_OUT = 8  # one of HELD_OUT videos is held out


@dataclasses.dataclass(frozen=True)
class Examples:
    """N videos that were sampled and scored, in a random order of their prompts.

    Attributes:
        latents: fp32 [N, F, H, W, C].
        text: [N, St, text_dim], embeddings of the prompts.
        padding: number of zero rows beyond St.
        rewards: [N].
    """

    latents: np.ndarray
    text: np.ndarray
    padding: int
    rewards: np.ndarray

    def __len__(self) -> int:
        return len(self.rewards)

    def select(self, rows: np.ndarray) -> "Examples":
        """Return some of the videos; rows: int or bool indices."""
        return dataclasses.replace(
            self, latents=self.latents[rows], text=self.text[rows], rewards=self.rewards[rows]
        )


def check_one_size(spec: RunSpec) -> None:
    """Raise `UserError` where training and evaluation have videos of several sizes in pixels."""
    sample, evaluation = spec.recipe.sample, spec.recipe.eval
    if sample.size_schedule or spec.shape[1:] != spec.eval_shape[1:]:
        raise UserError(
            f"config.sample.size_schedule={sample.size_schedule}, config.eval.height="
            f"{evaluation.height}, config.eval.width={evaluation.width}: a reward head learns videos of "
            "one size; leave them out, and give it as sample.height, sample.width and sample.shift"
        )


def fit(
    head: WanTransformer3D,
    examples: Examples,
    *,
    updates: int,
    batch: int,
    rate: float,
    seed: int,
    progress=lambda x: x,
) -> WanTransformer3D:
    """Return the head after `updates` of AdamW on mean((predict(x_s) - r)^2), with s uniform and new
    noise in every update. The result is a function of the seed.

    batch: videos of an update. rate: the learning rate, which falls to 0 as a cosine. progress: wraps
    the range of updates, to show a progress bar.
    """
    graphdef, params = nnx.split(head)
    # copied: the first update donates them, and they may be arrays of the model
    params = jax.tree.map(jnp.copy, params)
    optimiser = optax.adamw(optax.cosine_decay_schedule(rate, updates))
    key, rng = jax.random.key(seed), Stream.REWARD_HEAD.generator(seed)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params, opt, i, x0, text, rewards):
        prompts = TextBatch(text, text[0], examples.padding)

        def loss(params):
            head = nnx.merge(graphdef, params)
            return fit_error(head, jax.random.fold_in(key, i), x0, prompts, rewards)

        changes, opt = optimiser.update(jax.grad(loss)(params), opt, params)
        return optax.apply_updates(params, changes), opt

    opt = optimiser.init(params)
    for i in progress(range(updates)):
        rows = rng.choice(len(examples), batch, replace=len(examples) < batch)
        chosen = examples.select(rows)
        rewards = chosen.rewards.astype(np.float32)
        params, opt = update(params, opt, i, chosen.latents, chosen.text, rewards)
    return nnx.merge(graphdef, params)


def explained(
    head: WanTransformer3D, examples: Examples, batch: int, mean: float
) -> dict[float, float]:
    """Return by noise level the share of the rewards' spread around `mean` that the head predicts: 1 -
    its squared error divided by that of the mean. 0: as good as the mean; below 0: worse.

    batch: videos that are predicted at once.
    """
    rewards, total = examples.rewards, len(examples)
    run = nnx.jit(
        lambda head, x, t, text: predict(head, x, t, TextBatch(text, text[0], examples.padding))
    )
    # the last batch wraps around, so that all have one shape
    rows = [np.arange(first, first + batch) % total for first in range(0, total, batch)]
    shares = {}
    for level in LEVELS:
        x = noised(jax.random.key(1), jnp.asarray(examples.latents), level)
        batches = [run(head, x[index], 1000 * level, examples.text[index]) for index in rows]
        predicted = np.concatenate(batches)[:total]
        error = np.sum((predicted - rewards) ** 2)
        shares[level] = 1 - float(error / max(np.sum((rewards - mean) ** 2), 1e-12))
    return shares


def learned_rewards(weights: Mapping[str, float]) -> tuple[str, ...]:
    """Return the names of the rewards that a head learns: those with a weight, but measures of
    quality. Raises `UserError` without any. weights: of the measured rewards by name.
    """
    weighted = [name for name, weight in weights.items() if weight]
    names = tuple(name for name in weighted if name not in reward_combination.BAD_SIDE)
    if not names:
        raise UserError(
            f"config.reward.weights: only {', '.join(weighted)} have a weight, measures of quality, "
            "which a reward head does not learn: training compares them with a first evaluation. "
            "Give another reward a weight"
        )
    return names


def rewards_of(
    scores: GatheredScores, weights: Mapping[str, float]
) -> tuple[np.ndarray, dict[str, int]]:
    """Return the weighted sum of `learned_rewards`, float64 [N], nan where a video lacks one of them;
    and for how many videos each has no value, without those that all videos have.
    """
    nothing = np.full(len(scores.values), np.nan)
    known = {scores.main: scores.values} | scores.parts
    values = {name: known.get(name, nothing) for name in learned_rewards(weights)}
    missing = {name: int((~np.isfinite(each)).sum()) for name, each in values.items()}
    rewards = reward_combination.weighted_sum(values, weights)
    return rewards, {name: number for name, number in missing.items() if number}


def collect(
    spec: RunSpec, model: model_dir.ModelDir, weights: tuple, count: int, bar: Callable
) -> Examples:
    """Sample and score `count` videos in whole batches. Raises `UserError` where too few of them have
    different rewards.

    weights: the result of `load_transformers`. bar: (iterable, desc=...) -> the iterable with a
    progress bar.
    """
    recipe, settings, mesh, solver = spec.recipe, spec.settings, spec.mesh, spec.solver

    # ---- prompts, decoder, denoising steps ---------------------------------------------------
    prompts = load_scored_prompts(
        recipe.prompts.train,
        recipe.reward,
        settings.weights,
        skip_invalid=recipe.prompts.skip_invalid,
    )
    prompts = for_rewards(prompts, settings.weights, fps_of(spec.preset))
    order = Stream.REWARD_HEAD.generator(recipe.seed).permutation(len(prompts))
    chosen = np.resize(order, count)  # all prompts equally often, up to one
    print(f"{count} videos of {min(count, len(prompts))} prompts", flush=True)
    table = pipeline.embed_prompts(
        model,
        prompts.prompts,
        recipe.prompts.negative,
        dtype=settings.dtype,
        cache=True,
        progress=functools.partial(bar, desc="prompts"),
    )
    vae_graph, vae_state = pipeline.load_vae(model, mesh)
    decode = pipeline.make_decoder(vae_graph)
    graph, arrays = weights
    steps = pipeline.make_ode_steps(graph, solver, spec.eval_guidance)

    # ---- sample, decode and score, batch by batch --------------------------------------------
    replicated, sharded = sharding_lib.replicated(mesh), sharding_lib.batch_sharding(mesh)
    key = jax.random.key(recipe.seed)
    rows = np.arange(count, dtype=np.int32).reshape(-1, recipe.sample.batch_size)
    batches = [
        (
            initial_noise(key, sharding_lib.place(numbers, sharded), spec.shape),
            table.batch(chosen[numbers], sharded, replicated),
        )
        for numbers in rows
    ]
    latents, pending = [], []
    with open_pool(recipe.reward, settings.weights) as pool:
        sampled = pipeline.sample_ode(
            steps, lambda expert: (arrays(expert),), spec.eval_segments, solver, batches
        )
        for numbers, x in bar(zip(rows, sampled), total=len(rows), desc="videos"):
            latents.append(np.asarray(x))
            targets = [prompts.targets[prompt] for prompt in chosen[numbers]]
            pending.append(submit(pool, numbers, decode(vae_state, x)(), targets))
        scores = gather_scores(pending, count, settings.main)

    # ---- the videos with a reward ------------------------------------------------------------
    rewards, lacking = rewards_of(scores, settings.weights)
    good = np.flatnonzero(np.isfinite(rewards))
    print(f"{len(good)} of {count} videos have a reward", flush=True)
    if len(good) < 2 * HELD_OUT or np.ptp(rewards[good]) == 0:
        failures = ""
        if lacking:
            failed = ", ".join(f"{name} for {number}" for name, number in lacking.items())
            failures = f". There is no value of {failed}: {scores.why()}"
        raise UserError(
            f"{len(good)} of {count} videos have a reward, {np.unique(rewards[good]).size} "
            "different ones: too few to learn from; raise --videos, or use other prompts" + failures
        )
    return Examples(
        np.concatenate(latents)[good],
        table.padded([table.prompts[prompt] for prompt in chosen[good]]),
        pipeline.TEXT_ROWS - table.rows,
        rewards[good],
    )


def train(
    head: WanTransformer3D, examples: Examples, batch: int, **kwargs
) -> tuple[WanTransformer3D, dict[float, float]]:
    """Return (the head, fitted to seven of eight videos; the share of the others' spread that it
    predicts, by noise level). batch, kwargs: of `fit`.
    """
    held_out = np.arange(len(examples)) % HELD_OUT == 0
    fitted, others = examples.select(~held_out), examples.select(held_out)
    head = fit(head, fitted, batch=batch, **kwargs)
    return head, explained(head, others, batch, float(fitted.rewards.mean()))


def main(_):
    # ---- the recipe and the command's own flags ----------------------------------------------
    options = flags.FLAGS
    config = options["config"].value
    assert config is not None, "--config is required"
    out = pathlib.Path(options.out)
    config.run_dir = config.run_dir or str(out.parent)
    recipe = parse.recipe_from_config(config)
    settings = parse.settings_of(recipe)
    learned_rewards(settings.weights)  # raises before any long work
    if out.suffix != ".safetensors":
        raise UserError(f"--out {out}: the file's name must end in .safetensors")
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; give the name of a file in it")
    out.parent.mkdir(parents=True, exist_ok=True)
    if jax.process_count() > 1:
        raise UserError("grpo.reward_head runs in one process")

    # ---- the model ---------------------------------------------------------------------------
    cli.enable_compilation_cache()
    precision.use(recipe.model.matmul_precision)
    with cli.user_input():
        model = open_model(recipe)
        spec = RunSpec.make(recipe, settings, presets.of_folder(model), training=False)
        transformer, size = spec.preset.transformer, recipe.sample.batch_size
        if recipe.model.weights != "dtype":
            raise ValueError(
                f"config.model.weights={recipe.model.weights}: a reward head begins with blocks of the "
                "unquantised model; give --config.model.weights=dtype"
            )
        check_one_size(spec)
        if options.layers > transformer.num_layers:
            raise ValueError(
                f"--layers={options.layers}: the model has {transformer.num_layers} blocks; 0 makes "
                "a small head with random weights"
            )
    print(spec.placed, flush=True)
    bar = functools.partial(tqdm, leave=False, dynamic_ncols=True, disable=not sys.stderr.isatty())
    weights = load_transformers(
        model, options.checkpoint, settings.dtype, spec.backend, spec.mesh, recipe.model.offload
    )

    # ---- examples, training, the file --------------------------------------------------------
    examples = collect(spec, model, weights, -(-options.videos // size) * size, bar)
    if options.layers:  # of two experts the one of low noise, where most of a video can be seen
        last = weights[1](len(model.experts) - 1)
        head = from_model(transformer, last, options.layers, recipe.seed)
        del last
    else:
        head = make_head(head_config(transformer), recipe.seed)
    del weights
    head, shares = train(
        head,
        examples,
        options.batch,
        updates=options.updates,
        rate=options.learning_rate,
        seed=recipe.seed,
        progress=functools.partial(bar, desc="updates"),
    )
    save_head(options.out, head, {"model": recipe.model.path, **model.metadata})
    print(
        f"mean reward {examples.rewards.mean():.3f}; held-out spread explained at noise level "
        + ", ".join(f"{level:g}: {share:.2f}" for level, share in shares.items()),
        options.out,
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
        "number of the model's first blocks from which the head starts; 0: a small transformer with "
        "random weights",
        lower_bound=0,
    )
    flags.DEFINE_integer(
        "videos",
        512,
        "number of videos to sample, rounded up to whole batches",
        lower_bound=16,
        upper_bound=1_000_000,
    )
    flags.DEFINE_integer(
        "updates", 2000, "number of updates of the head", lower_bound=1, upper_bound=10_000_000
    )
    flags.DEFINE_integer(
        "batch", 32, "number of videos of an update", lower_bound=1, upper_bound=4096
    )
    define_number(
        "learning_rate",
        3e-4,
        "learning rate of AdamW, which falls to 0 as a cosine",
        Range(0, 1, above=True, below=True),
    )
    flags.mark_flag_as_required("config")
    cli.run(main)

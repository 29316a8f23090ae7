"""Tries the rewards of a recipe on a few videos before a run depends on them.

    python -m grpo.check_rewards --config=examples/redness/recipe.py [--groups=2] [--videos=4]

It samples a few groups of videos of the model that training starts from, as the recipe evaluates
(size, `eval.solver`, `eval.steps`, `eval.guidance`), and scores them, a black video, noise, and a
sample with its frames shuffled, each reward alone in one process. For each reward it prints the
values, their mean standard deviation within a group, which training learns from, the share that the
reward has in the weighted sum's spread, and the seconds of a video. The command ends with an error,
after the table, where a reward with a weight

    has no finite value for one of the videos, or is a part that no score has
    has the same value for all of them
    has another value when it is built again, or on another of its servers: a part of its model is
      drawn at random because its weights were not loaded, or it is not deterministic

Measures of quality are printed as measured; training compares them with those of the starting model.
"""

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Collection, Mapping

import jax
import numpy as np
from absl import flags
from flax import nnx
from ml_collections import config_flags
from tqdm import tqdm

from grpo.data.prompts import PromptSet
from grpo.rollout import initial_noise
from grpo.run import RunSpec, open_model
from grpo.scoring.reward_combination import BAD_SIDE
from grpo.scoring.reward_pool import open_pool
from grpo.scoring.scored_prompts import for_rewards, fps_of, load_scored_prompts
from grpo.settings import parse
from grpo.settings.named import TEXT, servers_by_name
from grpo.settings.reference import FLAG_HELP
from grpo.settings.schema import Recipe, main_reward
from rewards.base import last_line
from rewards.batch_scores import BatchScores
from rewards.clip import KINDS
from rewards.composite import DERIVED
from rewards.pool_set import Pool
from wan_jax.command_line import cli
from wan_jax.command_line.flag_types import define_number
from wan_jax.command_line.limits import CANDIDATES, Range
from wan_jax.diffusion.experts import per_guidance
from wan_jax.distributed import sharding as sharding_lib
from wan_jax.errors import UserError
from wan_jax.inference import pipeline
from wan_jax.models import precision, presets
from wan_jax.storage import model_dir
from wan_jax.storage.trained_weights import load_transformers

SYNTHETIC = ("black", "noise", "shuffled")
RANDOM = (
    "a part of its model is drawn at random because its weights were not loaded, or it is not "
    "deterministic"
)


@dataclasses.dataclass(frozen=True)
class Source:
    """Rewards that are computed together: settings that measure them alone.

    name: of the reward, or of its server. config: `recipe.reward` with this reward only. weights: of
    the rewards by name.
    """

    name: str
    config: object
    weights: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Row:
    """What was measured of one reward.

    Attributes:
        name: of the reward.
        weight: its weight.
        samples: float64 [groups, videos], of the model's samples.
        synthetic: float64 [3], of the videos `SYNTHETIC`; nan also where there is none.
        seconds: of a video, with the other rewards of its source.
    """

    name: str
    weight: float
    samples: np.ndarray
    synthetic: np.ndarray
    seconds: float

    @property
    def spread(self) -> float:
        """The mean over groups of the standard deviation within the group."""
        return float(self.samples.std(axis=1).mean())


def sources(reward, weights: dict[str, float]) -> list[Source]:
    """Return the rewards of a recipe that can be built alone; one for each server of a reward.

    reward: `recipe.reward`. weights: of the measured rewards by name.
    """
    servers, own = servers_by_name(reward.servers), dict(reward.own)
    unnamed = dataclasses.replace(reward, own=(), servers=(), workers=1)
    found = []
    for name in weights:
        if name in DERIVED or "." in name:
            continue
        together = {n: w for n, w in weights.items() if n == name or n.startswith(f"{name}.")}
        if name == TEXT:
            together |= {n: w for n, w in weights.items() if n in DERIVED}
        if name in own:
            config = dataclasses.replace(unnamed, own=((name, own[name]),))
            found.append(Source(name, config, together))
        elif name in servers:
            for url in servers[name]:
                address = url if name == TEXT else f"{name}={url}"
                config = dataclasses.replace(unnamed, servers=(address,))
                found.append(Source(name, config, together))
        else:
            found.append(Source(name, unnamed, together))
    return found


def sample_groups(
    spec: RunSpec, model: model_dir.ModelDir, prompts: PromptSet, groups: int, videos: int
) -> pipeline.Videos:
    """Return `videos` videos of each of the first `groups` prompts, group by group, of training's size."""
    spec = spec.of_sizes(spec.trained_sizes[0], spec.trained_sizes[0])
    recipe, settings, mesh = spec.recipe, spec.settings, spec.mesh
    count, devices = groups * videos, mesh.shape["data"] * mesh.shape["fsdp"]
    batch = min(recipe.sample.batch_size, -(-count // devices) * devices)
    rows = [np.arange(first, first + batch) % count for first in range(0, count, batch)]
    bar = functools.partial(tqdm, leave=False, disable=not sys.stderr.isatty(), desc="videos")
    table = pipeline.embed_prompts(
        model, prompts.prompts[:groups], recipe.prompts.negative, dtype=settings.dtype, cache=True
    )
    vae_graph, vae_state = pipeline.load_vae(model, mesh)
    decode = pipeline.make_decoder(vae_graph)
    graph, weights = load_transformers(
        model,
        None,
        settings.dtype,
        spec.backend,
        mesh,
        recipe.model.offload,
        spec.quantisation,
    )
    make = functools.partial(
        pipeline.make_ode_step, functools.partial(nnx.merge, graph), spec.solver
    )
    steps = per_guidance(make, spec.eval_guidance)
    replicated, sharded = sharding_lib.replicated(mesh), sharding_lib.batch_sharding(mesh)
    key = jax.random.key(recipe.eval.seed)
    batches = [
        (
            initial_noise(key, sharding_lib.place(row.astype(np.int32), sharded), spec.shape),
            table.batch(row // videos, sharded, replicated),
        )
        for row in rows
    ]
    latents = pipeline.sample_ode(
        steps, lambda expert: (weights(expert),), spec.eval_segments, spec.solver, batches
    )
    decoded = [decode(vae_state, x)() for x in bar(latents, total=len(rows))]
    return pipeline.Videos(
        np.concatenate([video.frames for video in decoded])[:count],
        np.concatenate([video.finite for video in decoded])[:count],
    )


def synthetic_videos(video: np.ndarray, seed: int) -> np.ndarray:
    """Return the videos `SYNTHETIC` of the shape of a video uint8 [T, H, W, 3]; the last one is that
    video with its frames in another order.
    """
    random = np.random.default_rng(seed)
    order = random.permutation(len(video))
    noise = random.integers(0, 256, video.shape, np.uint8)
    return np.stack([np.zeros_like(video), noise, video[order]])


def score(pool: Pool, videos: np.ndarray, records: list, size: int) -> tuple[BatchScores, float]:
    """Return the scores of groups of `size` videos, and then of videos that are each alone, and the
    seconds of a video. records: of the groups' videos; the others get the first one.
    """
    groups = [*(np.arange(len(records)) // size).tolist(), *SYNTHETIC]
    everything = [*records, *[records[0]] * len(SYNTHETIC)]
    scores = pool.submit(videos, everything, groups, size).result()
    return scores, scores.seconds / len(videos)


def values_of(scores: BatchScores, source: Source) -> dict[str, np.ndarray]:
    """Return the values of a source's rewards by name, float64 [N]."""
    return {main_reward(source.weights): scores.values} | scores.parts


def rows_of(
    source: Source, scores: BatchScores, weights: dict[str, float], size: int, seconds: float
) -> list[Row]:
    """Return what was measured of the rewards of a source."""
    rows, count = [], len(SYNTHETIC)
    for name, values in values_of(scores, source).items():
        samples, synthetic = values[:-count].reshape(-1, size), values[-count:]
        rows.append(Row(name, weights.get(name, 0.0), samples, synthetic, seconds))
    return rows


def absent(weights: Mapping[str, float], known: Collection[str]) -> list[str]:
    """Return why rewards with a weight cannot be trained on because no score has them, as a part with
    a misspelled name. weights: of the measured rewards. known: the names that the scores have.
    """
    return [
        f"{name} has a weight, but reward {name.partition('.')[0]} gives no such part, only "
        f"{', '.join(known)}"
        for name, weight in weights.items()
        if weight and name not in known
    ]


LEGEND = """\
samples: mean over the model's videos; in groups: standard deviation among the videos of a prompt, of
which training learns; share: of a reward in that of the weighted sum; black, noise, shuffled: the
values of a black video, of noise, and of a sample with its frames shuffled"""


def table(rows: list[Row]) -> list[str]:
    """Return the lines of a table of all rewards."""
    total = sum(row.weight * row.spread for row in rows if row.name not in BAD_SIDE) or np.nan
    lines = [
        "reward            weight  samples  in groups   share    black    noise shuffled   s/video"
    ]
    for row in rows:
        share = "-"
        if row.weight and row.name not in BAD_SIDE and np.isfinite(total):
            share = f"{row.weight * row.spread / total:.0%}"
        values = " ".join(f"{value:8.3f}" for value in row.synthetic)
        lines.append(
            f"{row.name:16} {row.weight:7.3g} {row.samples.mean():8.3f} {row.spread:10.4f} "
            f"{share:>7} {values} {row.seconds:9.3f}"
        )
    return lines


def problems_of(row: Row, error: str) -> str:
    """Return why a reward cannot be trained on, "" if nothing is known. error: the reward's last one."""
    values = np.concatenate([row.samples.ravel(), row.synthetic])
    failed = int((~np.isfinite(values)).sum())
    if failed:
        reason = f": {error}" if error else ""
        return f"{row.name} has no finite value for {failed} of {values.size} videos{reason}"
    if np.ptp(values) == 0:
        return (
            f"{row.name} is {values[0]:g} for every video, also for black and noise: a constant "
            "teaches nothing"
        )
    return ""


def check(recipe: Recipe, groups: int, size: int) -> None:
    """Try the rewards of a checked recipe, and print what was measured. Raises `UserError` where one
    cannot be trained on.

    groups: number of prompts. size: number of videos of each.
    """
    settings = parse.settings_of(recipe)
    prompts = load_scored_prompts(
        recipe.prompts.train, recipe.reward, settings.weights, limit=groups
    )
    groups = min(groups, len(prompts))
    cli.enable_compilation_cache()
    precision.use(recipe.model.matmul_precision)
    with cli.user_input():
        model = open_model(recipe)
        spec = RunSpec.make(recipe, settings, presets.of_folder(model), training=False)
    prompts = for_rewards(prompts, settings.weights, fps_of(spec.preset))
    records = [target for target in prompts.targets[:groups] for _ in range(size)]

    # ---- build every reward before anything is sampled ---------------------------------------
    found = sources(recipe.reward, settings.weights)
    with contextlib.ExitStack() as stack:
        pools = [stack.enter_context(open_pool(s.config, s.weights)) for s in found]
        sampled = sample_groups(spec, model, prompts, groups, size)
        if not sampled.finite.all():
            raise UserError(f"{(~sampled.finite).sum()} of the samples are not finite numbers")
        videos = np.concatenate(
            [sampled.frames, synthetic_videos(sampled.frames[0], recipe.eval.seed)]
        )

        # ---- score, and score again with what was built again --------------------------------
        rows: dict[str, Row] = {}
        problems: list[str] = []
        first: dict[str, np.ndarray] = {}
        for source, pool in zip(found, pools):
            scores, seconds = score(pool, videos, records, size)
            repeated = [(scores, "another server")]
            if source.name in dict(recipe.reward.own) or source.name in KINDS:
                pool.close()
                with open_pool(source.config, source.weights) as again:
                    repeated.append((score(again, videos, records, size)[0], "another process"))
            errors = [e for e in scores.errors if e]
            errors += [error for failed in scores.part_errors.values() for error in failed]
            error = last_line(errors[-1]) if errors else ""
            for row in rows_of(source, scores, settings.weights, size, seconds):
                rows.setdefault(row.name, row)
                problem = problems_of(row, error)
                if problem and row.weight:
                    problems.append(problem)
                elif problem:
                    print(f"note: {problem}; it has no weight")
            for batch, where in repeated:
                for name, values in values_of(batch, source).items():
                    if not np.array_equal(first.setdefault(name, values), values, equal_nan=True):
                        problems.append(f"{name} has other values in {where}: {RANDOM}")
        problems += absent(settings.weights, rows)

    print(*table([*rows.values()]), LEGEND, sep="\n", flush=True)
    for row in rows.values():
        if row.weight and row.spread == 0:
            print(f"note: {row.name} has no spread within these groups, so they teach nothing")
    if problems:
        raise UserError("; ".join(dict.fromkeys(problems)))


def main(_):
    options = flags.FLAGS
    check(parse.recipe_from_config(options.config), options.groups, options.videos)


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, FLAG_HELP, lock_config=True)
    define_number("groups", 2, "prompts to sample videos for", CANDIDATES, int)
    define_number("videos", 4, "videos of each prompt", Range(2, CANDIDATES.high), int)
    flags.mark_flag_as_required("config")
    cli.run(main)

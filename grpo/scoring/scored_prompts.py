"""The prompts of a recipe, with what the rewards need to know of them."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from grpo.data.prompts import PromptSet, epoch_prompts, load_prompts, without_shared
from grpo.records.console import print_once
from grpo.scoring.reward_combination import MAIN
from grpo.settings import parse
from grpo.settings.named import TEXT, servers_by_name
from grpo.settings.schema import BUILT_IN, Recipe
from rewards.base import PromptRecord
from rewards.clip import KINDS
from rewards.ocr.rules import make_readable_check
from rewards.ocr.targets import TargetError, parse_targets
from wan_jax.command_line.flag_types import user_path
from wan_jax.models.presets import Preset

FPS, TI2V_FPS = 16.0, 24.0  # frames per second of the published models' videos


def load_scored_prompts(
    path,
    config,
    weights: dict[str, float],
    limit: int | None = None,
    skip_invalid: bool = False,
) -> PromptSet:
    """Read the prompts of a file. They need quoted text or targets if a reward that reads text is
    measured.

    config: `config.reward`. The other arguments and the errors are those of `open_pool` and
    `grpo.data.prompts.load_prompts`.
    """
    if MAIN not in weights:
        return load_prompts(path, _targets_if_any, limit=limit, skip_invalid=skip_invalid)
    hint = ""
    if not config.weights[MAIN] or any(name not in BUILT_IN for name in weights):
        hint = (
            f"; config.reward.weights.ocr={config.weights[MAIN]} reads text: without text in the "
            "prompts set it to None"
        )
    check = targets_check(config)
    return load_prompts(path, parse_targets, limit, check, skip_invalid, hint)


def _targets_if_any(prompt: str) -> tuple[str, ...]:
    try:
        return parse_targets(prompt)
    except TargetError:
        return ()


def targets_check(config) -> Callable[[Sequence[str]], None] | None:
    """Return the check of targets for `grpo.data.prompts.load_prompts`: can the OCR engine read
    their characters?

    config: `config.reward`. None where servers or a judge read the text, or where the spelling has
    no weight.
    """
    if TEXT in servers_by_name(config.servers) or not config.weights[MAIN]:
        return None
    engines = [engine for engine in (config.engine, config.reader_two) if engine]
    checks = [check for check in map(make_readable_check, engines) if check is not None]

    def check_all(targets: Sequence[str]) -> None:
        for check in checks:
            check(targets)

    return check_all if checks else None


def for_rewards(prompts: PromptSet, weights: dict[str, float], fps: float = FPS) -> PromptSet:
    """Return the prompts with `PromptRecord`s as targets if a reward needs the prompt, else as they
    are. fps: frames per second of the videos.
    """
    added = [name for name in weights if name not in BUILT_IN]
    if not added and not set(weights) & set(KINDS):
        return prompts
    metadata = prompts.metadata if added and prompts.metadata else ({},) * len(prompts)
    records = map(PromptRecord, prompts.targets, prompts.prompts, metadata)
    return dataclasses.replace(
        prompts, targets=tuple(dataclasses.replace(record, fps=fps) for record in records)
    )


def fps_of(preset: Preset) -> float:
    """Return the frames per second of a model's videos."""
    return TI2V_FPS if preset.expand_timesteps else FPS


def load_more_prompts(recipe: Recipe, weights: dict[str, float]) -> dict[str, PromptSet]:
    """Return the prompts of `eval.more_prompts` by name. weights: of the measured rewards. Raises
    `UserError` as `load_scored_prompts` does.
    """
    limit, skip = recipe.eval.num_prompts, recipe.prompts.skip_invalid
    return {
        name: load_scored_prompts(user_path(path), recipe.reward, weights, limit, skip)
        for name, path in recipe.eval.more_prompts
    }


def load_prompt_sets(
    recipe: Recipe, settings: parse.Settings
) -> tuple[PromptSet, PromptSet, dict[str, PromptSet]]:
    """Return the prompts of training, of evaluation, and the further ones of evaluations by name.
    Raises `UserError` where they overlap, are too few, or cannot be scored.
    """
    skip = recipe.prompts.skip_invalid
    prompts, everything = (
        load_scored_prompts(path, recipe.reward, settings.weights, skip_invalid=skip)
        for path in (recipe.prompts.train, recipe.prompts.heldout)
    )
    heldout = everything.select(np.arange(len(everything)) < recipe.eval.num_prompts)
    # apart from the whole file, so that training prompts do not depend on eval.num_prompts
    prompts = without_shared(prompts, everything if skip else heldout, skip)
    more = load_more_prompts(recipe, settings.weights)
    for each in more.values():
        prompts = without_shared(prompts, each, skip)
    for key, found in (("train", prompts), ("heldout", everything)):
        if found.left_out:
            print_once(
                f"config.prompts.{key}: {len(found.left_out)} lines are left out, e.g. "
                f"{found.left_out[0].strip()}"
            )
    epoch_prompts(recipe.seed, 0, len(prompts), recipe.sample.groups)  # raises where too few
    return prompts, heldout, more

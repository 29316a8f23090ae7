"""Turns the ConfigDict of a recipe into a checked and typed `Recipe`, and that into the objects that
follow from it.
"""

import dataclasses
import operator
from collections.abc import Sequence

import jax.numpy as jnp
import ml_collections

from grpo import methods
from grpo.learning.method import Method
from grpo.learning.optimiser import OptimiserConfig
from grpo.settings import checks, validation
from grpo.settings.budget import Budget
from grpo.settings.schema import (
    SETTINGS,
    Recipe,
    is_marked,
    main_reward,
    make_recipe,
    measured_rewards,
    values_of,
)
from grpo.settings.validation import flat
from wan_jax.diffusion.schedule import flow_sigmas
from wan_jax.diffusion.sde import SDEConfig
from wan_jax.errors import UserError
from wan_jax.models.lora import LoRAConfig
from wan_jax.storage.paths import expand

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Settings:
    """The objects that follow from a recipe alone, without model and devices.

    Attributes:
        dtype: of the transformer's weights and matrix products.
        lora: configuration of the adapters; None: all weights are trained.
        sde: form of the stochastic steps.
        method: the training method with its settings.
        optimiser: configuration of the optimiser.
        videos: number of videos of an epoch.
        batches: number of rollout batches of an epoch.
        train_batches: number of them that are trained.
        weights: of the rewards that are measured, by name.
        budget: limits of the run.
    """

    dtype: type
    lora: LoRAConfig | None
    sde: SDEConfig
    method: Method
    optimiser: OptimiserConfig
    videos: int
    batches: int
    train_batches: int
    weights: dict[str, float]
    budget: Budget

    @property
    def main(self) -> str:
        """The name of the main reward, by whose value runs are judged."""
        return main_reward(self.weights)


def recipe_from_config(config: ml_collections.ConfigDict) -> Recipe:
    """Return the recipe, after all checks that need neither model nor devices. Raises `UserError`
    with the key, the value and a remedy.
    """
    validation.check_keys(config)
    values = validation.normalised(values_of(config))
    values = validation.with_own_weights(values, config.to_dict())
    validation.check_values(values)
    recipe = make_recipe(values)
    validation.check_secrets(recipe)
    validation.check_required(values)
    checks.check_together(recipe)
    return recipe


def from_config(config: ml_collections.ConfigDict) -> Settings:
    """Return `settings_of` the recipe of a ConfigDict, and writes the recipe's normalised values,
    e.g. of paths, into the ConfigDict. Raises `UserError` as `recipe_from_config` does.
    """
    recipe = recipe_from_config(config)
    before = values_of(config)
    for key, value in values_of(recipe).items():
        if value != before[key]:
            *sections, name = key.split(".")
            section = operator.attrgetter(".".join(sections))(config) if sections else config
            section[name] = value
    return settings_of(recipe)


def settings_of(recipe: Recipe) -> Settings:
    """Return the objects that follow from a checked recipe. Raises `UserError` where a setting is
    out of the range of one of them.
    """
    sample, train, lora = recipe.sample, recipe.train, recipe.lora
    videos = checks.videos_of(recipe)
    try:
        # raises where they give no schedule
        flow_sigmas(sample.steps, sample.shift, sample.schedule)
        return Settings(
            dtype=DTYPES[recipe.model.dtype],
            lora=LoRAConfig(lora.rank, lora.alpha, lora.targets) if lora.rank else None,
            sde=SDEConfig(sample.sde, sample.noise_level, sample.max_step_std),
            method=methods.method_class(train.method).from_recipe(recipe),
            optimiser=OptimiserConfig(
                **{f.name: train[f.name] for f in dataclasses.fields(OptimiserConfig)}
            ),
            videos=videos,
            batches=videos // sample.batch_size,
            train_batches=checks.trained_batches(recipe),
            weights=measured_rewards(recipe),
            budget=recipe.budget,
        )
    except ValueError as error:
        raise UserError(f"config: {error}") from None


# changes of the videos in the course of a run, by their epochs
SCHEDULES = "sample.frame_schedule", "sample.size_schedule"
# removed settings, each with the value that a run without it behaves like
REMOVED = {"model.fused": "off"}


def check_resume(saved: dict, now: dict, checkpoint: str, epoch: int = 0) -> tuple[str, ...]:
    """Return the settings that differ from those of a run's checkpoint, as 'KEY OLD -> NEW'; those
    that belong to a process, as paths, are left out. Raises `UserError` where a setting differs that
    a continued run may not change. Changes of the videos' size or length are settings of their epochs:
    those after the checkpoint may differ.

    saved, now: nested dicts, from `to_dict` of a recipe or a ConfigDict. checkpoint: its path. epoch:
    of the checkpoint.
    """
    # Settings that are newer than the checkpoint had their defaults, except that the method was
    # Flow-GRPO.
    defaults = flat(Recipe().to_dict()) | {"train.method": "grpo"}
    kept = {key: value for key, value in flat(saved).items() if (key, value) not in REMOVED.items()}
    before, after = _with_kl_weight(defaults | kept), _with_kl_weight(flat(now))
    if not before["data.path"]:  # a weight without data is refused now, and meant nothing
        before["data.weight"] = after["data.weight"]
    changed = {
        key: f"{before.get(key)!r} -> {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if not _same(key, before.get(key), after.get(key))
    }
    refused = [
        f"{key}: {x}"
        for key, x in changed.items()
        if not is_marked(key, "resume")
        and not (key in SCHEDULES and _until(before[key], epoch) == _until(after[key], epoch))
    ]
    if refused:
        raise UserError(
            f"{checkpoint} was made with other settings ({'; '.join(refused[:6])}); continue with "
            f"the same ones, or go on from its weights: {_new_run(before, checkpoint)}"
        )
    return tuple(
        f"{key} {x}"
        for key, x in changed.items()
        if key in SETTINGS and not SETTINGS[key].per_process and not SETTINGS[key].path
    )


def _new_run(saved: dict, checkpoint: str) -> str:
    """Return how to start a new run from the weights of a checkpoint.

    saved: its settings by key.
    """
    source = f"--src {saved['model.path']} --checkpoint {checkpoint}"
    if saved["lora.rank"]:
        steps = f"python -m convert.export_lora {source} --dst FILE.safetensors"
        return f"{steps}, then a new run with another --config.run_dir and --config.lora.init=FILE.safetensors"
    steps = f"python -m convert.to_diffusers {source} --dst FOLDER"
    return (
        f"{steps} and python -m convert.from_diffusers --src FOLDER --dst MODEL, then a new run with "
        "another --config.run_dir and --config.model.path=MODEL"
    )


def _with_kl_weight(values: dict) -> dict:
    """Return the values of all settings by key, with the default of the method where
    train.kl_weight is None.
    """
    weight = methods.kl_weight(values["train.method"], values["train.kl_weight"])
    return values | {"train.kl_weight": weight}


def _until(schedule: Sequence[Sequence], epoch: int) -> list[list]:
    """Return the entries of one of `SCHEDULES` that an epoch has reached."""
    return [list(entry) for entry in schedule if entry[0] <= epoch]


def _same(key: str, a, b) -> bool:
    """Return whether two values of a setting are equal; two paths, whether they lead to one place."""
    is_path = key in SETTINGS and SETTINGS[key].path
    return a == b or bool(is_path and a and b and expand(a) == expand(b))

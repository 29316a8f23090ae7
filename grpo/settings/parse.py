"""A recipe's ConfigDict, checked, as a typed `Recipe` and as the objects that follow from it."""

import dataclasses
import operator

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
    """What follows from a recipe alone.

    Attributes:
        dtype: of the transformer's weights and matrix products.
        lora: None: all weights are trained.
        method: with its own settings.
        videos: number of videos of an epoch.
        batches: number of rollout batches of an epoch.
        train_batches: number of them that are trained.
        weights: of the rewards that are measured, by name.
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


def recipe_from_config(c: ml_collections.ConfigDict) -> Recipe:
    """Checks everything that can be checked without model and device. Raises `UserError` naming the
    key, the value and what to do.
    """
    validation.check_keys(c)
    values = validation.normalised(values_of(c))
    validation.check_values(values)
    recipe = make_recipe(values)
    validation.check_secrets(recipe)
    validation.check_required(values)
    checks.check_together(recipe)
    return recipe


def from_config(c: ml_collections.ConfigDict) -> Settings:
    """Returns `settings_of` the recipe, after `recipe_from_config`; writes paths and empty settings
    into `c` as they are in the recipe.
    """
    recipe = recipe_from_config(c)
    before = values_of(c)
    for key, value in values_of(recipe).items():
        if value != before[key]:
            *sections, name = key.split(".")
            section = operator.attrgetter(".".join(sections))(c) if sections else c
            section[name] = value
    return settings_of(recipe)


def settings_of(recipe: Recipe) -> Settings:
    """Derives the objects that the parts of a run take from a checked recipe. Raises `UserError`."""
    sample, train, lora = recipe.sample, recipe.train, recipe.lora
    videos = checks.videos_of(recipe)
    try:
        flow_sigmas(sample.steps, sample.shift)
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


def check_resume(saved: dict, now: dict, checkpoint: str) -> None:
    """Checks that a run's checkpoint was made with the settings that are given now, except those
    that a continued run may change. Raises `UserError`.

    saved, now: nested dicts, of a recipe's or a ConfigDict's `to_dict`.
    """
    # A setting that is newer than the run had its default, but the method was Flow-GRPO.
    known = flat(Recipe().to_dict()) | {"train.method": "grpo"}
    saved, now = (
        {
            **values,
            "train.kl_weight": methods.kl_weight(values["train.method"], values["train.kl_weight"]),
        }
        for values in (known | flat(saved), flat(now))
    )
    changed = [
        f"{key}: {saved.get(key)!r} -> {now.get(key)!r}"
        for key in sorted(saved.keys() | now.keys())
        if not is_marked(key, "resume") and not _same(key, saved.get(key), now.get(key))
    ]
    if changed:
        raise UserError(
            f"{checkpoint} was made with other settings ({'; '.join(changed[:6])}); continue with "
            "the same ones, or start a new run with another --config.run_dir"
        )


def _same(key: str, a, b) -> bool:
    """Whether two values of a setting mean the same; of paths, whether they lead to one place."""
    is_path = key in SETTINGS and SETTINGS[key].path
    return a == b or bool(is_path and a and b and expand(a) == expand(b))

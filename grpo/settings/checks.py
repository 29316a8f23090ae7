"""Check of settings that must not contradict each other, for all methods.

`recipe` is a `grpo.settings.schema.Recipe`, or a ConfigDict with the same keys. All checks raise
`UserError` with the keys, the values and a remedy.
"""

from grpo import methods
from grpo.records import trackers
from grpo.scoring.reward_combination import BAD_SIDE
from grpo.scoring.reward_servers import check_settings
from grpo.settings import frame_schedule
from grpo.settings.schema import measured_rewards
from rewards.clip import KINDS, check_model
from wan_jax.errors import UserError


def check_together(recipe) -> None:
    """Makes all checks of this module, and those of the recipe's method."""
    check_settings(recipe.reward)
    trackers.check(recipe.log)
    methods.check_variants(recipe)
    check_batches(recipe)
    methods.method_class(recipe.train.method).check(recipe)
    check_updates(recipe)
    check_rewards(recipe)
    check_lora(recipe)
    check_evaluation(recipe)
    frame_schedule.check(recipe)


def videos_of(recipe) -> int:
    """Return the number of videos of an epoch."""
    return recipe.sample.groups * recipe.sample.group_size


def trained_batches(recipe) -> int:
    """Return the number of rollout batches of an epoch that are trained."""
    return (
        (recipe.train.groups or recipe.sample.groups)
        * recipe.sample.group_size
        // recipe.sample.batch_size
    )


def check_batches(recipe) -> None:
    """Check that the videos of an epoch fill its rollout batches."""
    videos, batch = videos_of(recipe), recipe.sample.batch_size
    if videos % batch:
        raise UserError(
            f"config.sample: groups x group_size = {videos} videos do not fill batches of "
            f"batch_size={batch}; choose a divisor of {videos}"
        )


def check_updates(recipe) -> None:
    """Check that the trained batches of an epoch can be divided among its updates."""
    batches, updates = trained_batches(recipe), recipe.train.updates_per_epoch
    if batches % updates:
        raise UserError(
            f"config.train.updates_per_epoch={updates} does not divide the epoch's {batches} batches"
        )


def check_rewards(recipe) -> None:
    """Check that a reward has a weight, and that each one can be measured."""
    weights = measured_rewards(recipe)
    if not any(weights.values()):
        explicit = {name: weights[name] for name in weights if name not in recipe.reward.panel}
        raise UserError(f"config.reward.weights={explicit}: one weight must be above 0")
    for name in (kind for kind in KINDS if kind in weights):
        path = recipe.reward[f"{name}_model"]
        if not path or recipe.reward.servers:
            raise UserError(
                f"config.reward.weights.{name} is scored by the workers here: set "
                f"config.reward.{name}_model={path!r} to the model's folder, and give no "
                f"config.reward.servers={tuple(recipe.reward.servers)}"
            )
        try:
            check_model(path)
        except ValueError as error:
            raise UserError(f"config.reward.{name}_model: {error}") from None
    quality = {name for name in BAD_SIDE if recipe.reward.weights[name] is not None}
    if recipe.sample.frame_schedule and quality:
        raise UserError(
            f"config.reward.weights has {', '.join(sorted(quality))}, which are judged by the base "
            "model's videos of one length: leave out either them or config.sample.frame_schedule"
        )


def check_lora(recipe) -> None:
    """Check that adapters have layers, and that a file of adapters is only given with adapters."""
    lora = recipe.lora
    if lora.rank and not lora.targets:
        raise UserError(
            "config.lora.targets is empty: name the layers to adapt, or train all weights with "
            "lora.rank=0"
        )
    if lora.init and not lora.rank:
        raise UserError(
            f"config.lora.init={lora.init} needs adapters to start from: set config.lora.rank as "
            "in the file"
        )


def check_evaluation(recipe) -> None:
    """Check that evaluations without guidance are only made where the others have guidance."""
    if recipe.eval.also_unguided and recipe.eval.guidance <= 1:
        raise UserError(
            f"config.eval.also_unguided=True: with eval.guidance={recipe.eval.guidance} there is no "
            "guidance to leave out; set it above 1, or also_unguided=False"
        )

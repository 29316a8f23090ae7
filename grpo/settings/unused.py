"""Settings that a run does not read. A run prints the changed ones at its start, in one line.

They are not refused, so that the method of a recipe can be changed, and a run can be continued,
without removing them. `grpo.methods` refuses settings that choose a variant of another method.
"""

from grpo import methods
from grpo.data.labels import LINES
from grpo.settings.choices import JUDGE, JUDGE_QUESTIONS, SLIDING
from grpo.settings.schema import SETTINGS, values_of

# settings of an epoch's videos, which training on data alone does not make
OF_VIDEOS = (
    "data.weight",
    "train.timesteps",
    "train.kl_gate",
    "train.box_credit",
    "train.box_kl",
    "sample.frame_schedule",
    "sample.size_schedule",
    "sample.groups",
    "sample.group_size",
    "sample.ode_solver",
    "sample.reward_guidance",
    "sample.reward_head",
    "reward.head_refit",
    "reward.confidence",
)


def unread(recipe) -> dict[str, str]:
    """Returns {key: reason} of all settings that the run of a recipe does not read. The reason is the
    value of another setting, as text.

    recipe: a `grpo.settings.schema.Recipe`, or a ConfigDict with the same keys.
    """
    train, reward = recipe.train, recipe.reward
    method, cause = methods.method_class(train.method), f"train.method={train.method}"
    of_others = {key for other in methods.all_methods() for key in other.reads} - {*method.reads}
    plain_sum = not method.on_advantages and reward.combine == "rewards"
    causes = (
        (True, cause, of_others),
        (plain_sum, cause, ("train.advantage_std", "train.advantage_clip")),
        (train.objective == "dppo", "train.objective=dppo", ("train.clip_low", "train.clip_high")),
        (train.objective != "dppo", f"train.objective={train.objective}", ("train.divergence",)),
        (
            train.kl_target is None,
            "train.kl_target=None",
            ("train.kl_horizon", "train.kl_weight_range"),
        ),
        (
            train.on_alarm != "kl",
            f"train.on_alarm={train.on_alarm}",
            ("train.alarm_kl", "train.alarm_calm"),
        ),
        (train.kl_reference == "base", "train.kl_reference=base", ("train.kl_reference_decay",)),
        (
            not train.cfg_distill_weight,
            "train.cfg_distill_weight=0",
            ("train.cfg_distill_guidance", "train.cfg_distill_guidance_2"),
        ),
        (
            recipe.sample.sde_window not in SLIDING,
            f"sample.sde_window={recipe.sample.sde_window}",
            ("sample.sde_window_epochs",),
        ),
        (
            recipe.sample.guidance <= 1,
            f"sample.guidance={recipe.sample.guidance}",
            ("sample.guidance_2", "train.guided"),
        ),
        (
            recipe.model.single_expert,
            "model.single_expert=True",
            ("model.offload", "sample.guidance_2", "eval.guidance_2"),
        ),
        *(
            (
                bool(recipe.sample[name])
                and all(first > recipe.epochs for first, *_ in recipe.sample[name]),
                f"epochs={recipe.epochs}",
                (f"sample.{name}",),
            )
            for name in ("size_schedule", "frame_schedule")
        ),
        (
            recipe.sample.untrained_noise and method.keeps_steps,
            "sample.untrained_noise=True",
            ("sample.ode_solver",),
        ),
        (
            recipe.eval.solver == "flow_match_euler",
            "eval.solver=flow_match_euler",
            ("eval.schedule",),
        ),
        (recipe.eval.guidance <= 1, f"eval.guidance={recipe.eval.guidance}", ("eval.guidance_2",)),
        (
            max(recipe.sample.guidance, recipe.eval.guidance) <= 1 and not train.cfg_distill_weight,
            "no guidance",
            ("prompts.negative",),
        ),
        (
            not recipe.data.path,
            "data.path is empty",
            ("data.weight", "data.batch_size", "data.noise"),
        ),
        (
            not recipe.data.only or method.of_data not in LINES,
            f"data.only={recipe.data.only}, {cause}",
            ("data.labels",),
        ),
        (recipe.data.only, "data.only=True", OF_VIDEOS),
        (
            recipe.data.path and not recipe.data.weight and not recipe.data.only,
            f"data.weight={recipe.data.weight:g}",
            ("data.path", "data.batch_size", "data.noise"),
        ),
        (
            not recipe.sample.reward_guidance,
            "sample.reward_guidance=0",
            ("sample.reward_head", "reward.head_refit"),
        ),
        (not recipe.lora.rank, "lora.rank=0", ("lora.alpha", "lora.targets")),
        (
            not reward.servers,
            "reward.servers=()",
            ("reward.token_env", "reward.timeout", "reward.retries", "reward.patience"),
        ),
        (
            reward.weights.ocr is None,
            "reward.weights.ocr=None",
            ("reward.rule", "reward.engine", "reward.reader_two"),
        ),
        (
            reward.engine != JUDGE,
            f"reward.engine={reward.engine}",
            ("reward.judge_model", "reward.judge_question"),
        ),
        (
            reward.engine == JUDGE and reward.judge_question != JUDGE_QUESTIONS[0],
            f"reward.judge_question={reward.judge_question}",
            ("reward.rule",),
        ),
        (reward.weights.clip is None, "reward.weights.clip=None", ("reward.clip_model",)),
        (
            reward.weights.pickscore is None,
            "reward.weights.pickscore=None",
            ("reward.pickscore_model",),
        ),
        (not recipe.log.wandb.project, "log.wandb.project is empty", ("log.wandb.entity",)),
        (not recipe.log.mlflow.uri, "log.mlflow.uri is empty", ("log.mlflow.experiment",)),
    )
    return {key: cause for holds, cause, keys in reversed(causes) if holds for key in keys}


def changed_in_vain(recipe) -> list[str]:
    """Return a line about settings that differ from their defaults and are not read; [] without any.

    recipe: a `grpo.settings.schema.Recipe`, or a ConfigDict with the same keys.
    """
    values = values_of(recipe)
    by_cause: dict[str, list[str]] = {}
    for key, cause in unread(recipe).items():
        if values[key] != SETTINGS[key].default:
            by_cause.setdefault(cause, []).append(key)
    parts = [f"{', '.join(sorted(keys))} ({cause})" for cause, keys in sorted(by_cause.items())]
    return [f"settings without effect in this run: {'; '.join(parts)}"] if parts else []

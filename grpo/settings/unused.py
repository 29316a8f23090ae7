"""Settings that a run does not read: one line at its start names those that were changed all the
same.

They are not refused, so that a recipe can be given another method, and a run can be resumed,
without taking them out. What would mean something else under another method is refused by
`grpo.settings.parse`.
"""

import ml_collections

from configs.defaults import defaults
from grpo.scoring.reward_servers import JUDGE, JUDGE_QUESTIONS
from grpo.settings.limits import flat

POLICY = (
    "sample.sde_steps",
    "sample.sde_range",
    "sample.sde_window_epochs",
    "sample.noise_level",
    "sample.max_step_std",
    "train.clip_low",
    "train.clip_high",
    "train.divergence",
    "train.kl_kind",
    "train.kl_horizon",
    "train.kl_weight_range",
    "train.kl_reference_decay",
    "train.cfg_distill_guidance",
    "train.cfg_distill_guidance_2",
    "train.ratio_tolerance",
)


def unread(c: ml_collections.ConfigDict) -> dict[str, str]:
    """Return every setting that this recipe's run does not read, with the setting that is the
    cause.
    """
    train, reward = c.train, c.reward
    grpo, method = train.method == "grpo", f"train.method={train.method}"
    plain_sum = train.method in ("dpo", "rwr", "sft") and reward.combine == "rewards"
    causes = (
        (not grpo, method, POLICY),
        (grpo, method, ("train.timesteps", "train.guided")),
        (train.method != "nft", method, ("train.nft_beta", "train.old_rate", "train.old_most")),
        (train.method != "dpo", method, ("train.dpo_beta", "train.reference_every")),
        (train.method != "rwr", method, ("train.temperature",)),
        (train.method == "dpo", method, ("train.kl_weight",)),
        (plain_sum, method, ("train.advantage_std", "train.advantage_clip")),
        (train.objective == "dppo", "train.objective=dppo", ("train.clip_low", "train.clip_high")),
        (train.objective != "dppo", f"train.objective={train.objective}", ("train.divergence",)),
        (
            train.kl_target is None,
            "train.kl_target=None",
            ("train.kl_horizon", "train.kl_weight_range"),
        ),
        (train.kl_reference == "base", "train.kl_reference=base", ("train.kl_reference_decay",)),
        (
            not train.cfg_distill_weight,
            "train.cfg_distill_weight=0",
            ("train.cfg_distill_guidance", "train.cfg_distill_guidance_2"),
        ),
        (
            c.sample.sde_window not in ("progressive", "decay", "exp_decay"),
            f"sample.sde_window={c.sample.sde_window}",
            ("sample.sde_window_epochs",),
        ),
        (
            c.sample.guidance <= 1,
            f"sample.guidance={c.sample.guidance}",
            ("sample.guidance_2", "train.guided"),
        ),
        (c.eval.guidance <= 1, f"eval.guidance={c.eval.guidance}", ("eval.guidance_2",)),
        (
            max(c.sample.guidance, c.eval.guidance) <= 1 and not train.cfg_distill_weight,
            "no guidance",
            ("prompts.negative",),
        ),
        (not c.lora.rank, "lora.rank=0", ("lora.alpha", "lora.targets")),
        (
            not reward.servers,
            "reward.servers=()",
            ("reward.token_env", "reward.timeout", "reward.retries", "reward.patience"),
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
        (not c.log.wandb.project, "log.wandb.project is empty", ("log.wandb.entity",)),
        (not c.log.mlflow.uri, "log.mlflow.uri is empty", ("log.mlflow.experiment",)),
    )
    return {key: cause for holds, cause, keys in reversed(causes) if holds for key in keys}


def changed_in_vain(c: ml_collections.ConfigDict) -> list[str]:
    """Return a line, or none, about settings that differ from their defaults and are not read."""
    values, plain = flat(c.to_dict()), flat(defaults().to_dict())
    by_cause: dict[str, list[str]] = {}
    for key, cause in unread(c).items():
        if values[key] != plain[key]:
            by_cause.setdefault(cause, []).append(key)
    parts = [f"{', '.join(sorted(keys))} ({cause})" for cause, keys in sorted(by_cause.items())]
    return [f"settings without effect in this run: {'; '.join(parts)}"] if parts else []

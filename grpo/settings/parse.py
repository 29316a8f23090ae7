"""A recipe's ConfigDict, checked and turned into the small dataclasses that the parts take."""

import dataclasses

import jax.numpy as jnp
import ml_collections

from configs.defaults import defaults
from grpo.advantages import STDS
from grpo.methods.flow_matching import FORWARD_METHODS, ForwardConfig
from grpo.methods.losses import OBJECTIVES, LossConfig
from grpo.records import trackers
from grpo.rollout import CREDITS, ODE_SOLVERS
from grpo.scoring.reward_combination import BAD_SIDE, COMBINATIONS, MAIN
from grpo.scoring.reward_servers import JUDGE, JUDGE_QUESTIONS, check_settings
from grpo.sde_windows import ONE_PER_GROUP, WINDOWS
from grpo.settings import frame_schedule, limits
from grpo.settings.budget import Budget
from grpo.settings.limits import PATHS, flat
from grpo.update import OptimiserConfig
from rewards.clip import KINDS, check_model
from rewards.ocr.engines import ENGINES
from rewards.ocr.rules import RULES
from wan_jax.diffusion.experts import OFFLOAD
from wan_jax.diffusion.schedule import flow_sigmas
from wan_jax.diffusion.sde import SDEConfig
from wan_jax.diffusion.solvers import SOLVERS
from wan_jax.errors import UserError
from wan_jax.models.attention import BACKENDS
from wan_jax.models.lora import LoRAConfig
from wan_jax.models.transformer import REMAT_POLICIES
from wan_jax.storage.paths import expand

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
# |ratio - 1| on policy where train.ratio_tolerance is None. In bfloat16 the two programs may round
# in other places: 1e-7 to 6e-6 seen on an H200 at full size, 6e-4 where XLA had merged products. A
# wrong step or text is far above.
RATIO_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-3}
KL_PLACES = ("loss", "reward")
REFERENCES = ("base", "average")
# settings that choose among GRPO's variants: the other methods would leave them aside without a
# word, so they must stay as in configs/defaults.py
GRPO_ONLY = (
    "sample.sde",
    "sample.sde_window",
    "train.groups",
    "train.best_of",
    "train.objective",
    "train.credit",
    "train.kl_as",
    "train.kl_target",
    "train.kl_reference",
    "train.cfg_distill_weight",
)
KL_WEIGHT = {"grpo": 0.004, "nft": 1e-4}  # where train.kl_weight is None; of other methods 0
REQUIRED = ("run_dir", "model.path", "prompts.train", "prompts.heldout")
CHOICES = {
    "model.dtype": DTYPES,
    "model.attention": BACKENDS,
    "model.remat": ("auto", *REMAT_POLICIES),
    "model.offload": OFFLOAD,
    "train.method": ("grpo", *FORWARD_METHODS),
    "sample.sde_window": WINDOWS,
    "sample.ode_solver": ODE_SOLVERS,
    "train.credit": CREDITS,
    "train.objective": OBJECTIVES,
    "train.kl_as": KL_PLACES,
    "train.kl_reference": REFERENCES,
    "train.advantage_std": STDS,
    "reward.rule": RULES,
    "reward.engine": (*ENGINES, JUDGE),
    "reward.judge_question": JUDGE_QUESTIONS,
    "eval.solver": SOLVERS,
    "reward.combine": COMBINATIONS,
}
# a resumed run may differ from its checkpoint in these: they do not change what an epoch computes
FREE = (
    "epochs",
    "budget.",
    "run_dir",
    "eval.",
    "save.",
    "reward.workers",
    "reward.servers",
    "reward.token_env",
    "reward.timeout",
    "reward.retries",
    "reward.patience",
    "model.path",
    "model.offload",
    "prompts.heldout",
    "mesh.",
    "train.offload_optimiser",
    "log.",
    "reward.clip_model",
    "reward.pickscore_model",
)


@dataclasses.dataclass(frozen=True)
class Settings:
    dtype: type
    lora: LoRAConfig | None
    sde: SDEConfig
    loss: LossConfig  # of GRPO
    forward: ForwardConfig | None  # of its relatives; None: GRPO
    optimiser: OptimiserConfig
    videos: int  # an epoch's videos
    batches: int  # an epoch's rollout batches
    train_batches: int  # those of them that are trained
    ratio_tolerance: float
    weights: dict[str, float]  # of the rewards that are measured
    budget: Budget
    kl_reward: float  # what the KL takes off the reward of a step, a multiple of it
    # whether each of a video's steps counts by what it brought it nearer to its end
    importance: bool
    # noise levels a video of a method that trains on finished videos; None: GRPO
    levels: int | None

    @property
    def keeps_old(self) -> bool:
        """Whether the run's state has weights of earlier updates."""
        return (
            self.loss.reference_decay is not None
            if self.forward is None
            else self.forward.keeps_old
        )

    @property
    def advantage_by_step(self) -> bool:
        """Whether a video's steps have advantages of their own."""
        return self.kl_reward > 0 or self.importance

    @property
    def needs_reference(self) -> bool:
        """Whether the base model is computed with, beside the one that is trained."""
        if self.forward is not None:
            return self.forward.needs_reference
        base = self.loss.kl_beta > 0 and self.loss.reference_decay is None
        return base or self.loss.distill_weight > 0 or self.kl_reward > 0

    @property
    def passes(self) -> int:
        """Forward passes that an update's FLOPs are worth: three of the policy, one of each other
        model, also of the reference that is run at sampling; a teacher has guidance, for two.
        """
        if self.forward is not None:
            return 3 + self.needs_reference + self.keeps_old
        return (
            3 + (self.loss.kl_beta > 0 or self.kl_reward > 0) + 2 * (self.loss.distill_weight > 0)
        )


def from_config(c: ml_collections.ConfigDict) -> Settings:
    """Check what can be checked without model or device, and write paths and empty settings in `c`
    in one way.

    Raises `UserError` naming the key, the value and the fix.
    """
    limits.check_keys(c)
    limits.normalise(c)
    limits.check_values(c)
    limits.check_secrets(c)
    values = flat(c.to_dict())
    for key in REQUIRED:
        if not values[key]:
            raise UserError(
                f"config.{key} is empty: set it in the recipe or with --config.{key}=..."
            )
    for key, choices in CHOICES.items():
        if values[key] not in choices:
            raise UserError(f"config.{key}={values[key]!r}: choose one of {', '.join(choices)}")
    check_settings(c.reward)
    trackers.check(c.log)
    videos = c.sample.groups * c.sample.group_size
    if videos % c.sample.batch_size:
        raise UserError(
            f"config.sample: groups x group_size = {videos} videos do not fill batches of "
            f"batch_size={c.sample.batch_size}; choose a divisor of {videos}"
        )
    batches = videos // c.sample.batch_size
    train_batches = check_choice(c) or batches
    if train_batches % c.train.updates_per_epoch:
        raise UserError(
            f"config.train.updates_per_epoch={c.train.updates_per_epoch} does not divide the "
            f"epoch's {train_batches} batches"
        )
    grpo = c.train.method == "grpo"
    if not grpo:
        check_forward(c, values)
    low, high = c.sample.sde_range
    if grpo and not (0 <= low < high <= c.sample.steps and 1 <= c.sample.sde_steps <= high - low):
        raise UserError(
            f"config.sample: sde_steps={c.sample.sde_steps} steps do not fit in sde_range=({low}, "
            f"{high}) of {c.sample.steps} steps"
        )
    if c.sample.sde_window == ONE_PER_GROUP and c.sample.sde_steps != 1:
        raise UserError(
            f"config.sample.sde_steps={c.sample.sde_steps} must be 1 with sample.sde_window="
            f"{ONE_PER_GROUP}"
        )
    if c.train.credit == "otca" and c.sample.sde_steps < 2:
        raise UserError(
            f"config.train.credit=otca shares a video's advantage among its trained steps, and "
            f"sample.sde_steps={c.sample.sde_steps} leaves one: raise it, or choose another credit"
        )
    weights = {k: v for k, v in c.reward.weights.items() if v is not None}
    if not any(weights.values()) or MAIN not in weights:
        raise UserError(
            f"config.reward.weights={weights}: one weight must be above 0, and {MAIN} must have one"
        )
    for name in KINDS:
        if name in weights:
            path = c.reward[f"{name}_model"]
            if not path or c.reward.servers:
                raise UserError(
                    f"config.reward.weights.{name} is scored by the workers here: set "
                    f"config.reward.{name}_model={path!r} to the model's folder, and give no "
                    f"config.reward.servers={tuple(c.reward.servers)}"
                )
            try:
                check_model(path)
            except ValueError as error:
                raise UserError(f"config.reward.{name}_model: {error}") from None
    if c.sample.frame_schedule and (quality := set(weights) & set(BAD_SIDE)):
        raise UserError(
            f"config.reward.weights has {', '.join(sorted(quality))}, which are judged by the base "
            "model's videos of one length: leave them or config.sample.frame_schedule out"
        )
    if unknown := set(c.train.experts) - {"transformer", "transformer_2"}:
        raise UserError(
            f"config.train.experts names {', '.join(sorted(unknown))}: choose from transformer and "
            "transformer_2"
        )
    if c.lora.rank and not c.lora.targets:
        raise UserError(
            "config.lora.targets is empty: name the layers to adapt, or train all weights with "
            "lora.rank=0"
        )
    if c.lora.init and not c.lora.rank:
        raise UserError(
            f"config.lora.init={c.lora.init} needs adapters to start from: set config.lora.rank as "
            "in the file"
        )
    in_reward, kl_weight = c.train.kl_as == "reward", kl_weight_of(values)
    if in_reward and not (
        kl_weight > 0 and c.train.kl_target is None and c.reward.combine == "rewards"
    ):
        raise UserError(
            "config.train.kl_as=reward takes kl_weight times the KL off a fixed sum of rewards: "
            f"it needs train.kl_weight={kl_weight} above 0, train.kl_target={c.train.kl_target} "
            f"None and reward.combine={c.reward.combine} to be rewards"
        )
    averaged = c.train.kl_reference == "average"
    if averaged and in_reward:
        raise UserError(
            "config.train.kl_reference=average is of the KL in the loss: set train.kl_as=loss, or "
            "train.kl_reference=base"
        )
    if c.train.cfg_distill_weight and not c.sample.guidance <= 1 < c.train.cfg_distill_guidance:
        raise UserError(
            f"config.train.cfg_distill_weight={c.train.cfg_distill_weight} trains the model "
            f"without guidance to follow the guided one: set sample.guidance={c.sample.guidance} "
            f"to 1 and train.cfg_distill_guidance={c.train.cfg_distill_guidance} above 1"
        )
    if c.eval.also_unguided and c.eval.guidance <= 1:
        raise UserError(
            f"config.eval.also_unguided=True: with eval.guidance={c.eval.guidance} there is no "
            "guidance to leave out; set it above 1, or also_unguided=False"
        )
    try:
        flow_sigmas(c.sample.steps, c.sample.shift)
        frame_schedule.check(
            c.sample.frames, c.sample.frame_schedule, c.eval.frames, c.eval.more_frames
        )
        return Settings(
            dtype=DTYPES[c.model.dtype],
            lora=LoRAConfig(c.lora.rank, c.lora.alpha, tuple(c.lora.targets))
            if c.lora.rank
            else None,
            sde=SDEConfig(c.sample.sde, c.sample.noise_level, c.sample.max_step_std),
            loss=LossConfig(
                c.train.clip_low,
                c.train.clip_high,
                0.0 if in_reward else kl_weight,
                c.train.kl_kind,
                c.train.objective,
                c.train.divergence,
                c.train.kl_target,
                c.train.kl_horizon,
                tuple(c.train.kl_weight_range),
                c.train.cfg_distill_weight,
                reference_decay=c.train.kl_reference_decay if averaged else None,
            ),
            forward=None
            if grpo
            else ForwardConfig(
                c.train.method,
                c.train.nft_beta,
                c.train.advantage_clip,
                c.train.old_rate,
                c.train.old_most,
                c.train.dpo_beta,
                c.train.reference_every,
                c.train.temperature,
                kl_weight,
                c.train.guided,
            ),
            optimiser=OptimiserConfig(
                **{f.name: c.train[f.name] for f in dataclasses.fields(OptimiserConfig)}
            ),
            videos=videos,
            batches=batches,
            train_batches=train_batches,
            ratio_tolerance=RATIO_TOLERANCE[c.model.dtype]
            if c.train.ratio_tolerance is None
            else c.train.ratio_tolerance,
            weights=weights,
            budget=Budget(**c.budget.to_dict()),
            kl_reward=kl_weight if in_reward else 0.0,
            importance=c.train.credit == "otca",
            levels=None if grpo else c.train.timesteps,
        )
    except ValueError as error:
        raise UserError(f"config: {error}") from None


def check_choice(c: ml_collections.ConfigDict) -> int:
    """How many rollout batches are trained where groups are chosen by their rewards, 0 where all
    are.
    """
    size, batch, groups = c.sample.group_size, c.sample.batch_size, c.train.groups
    if 2 * c.train.best_of > size:
        raise UserError(
            f"config.train.best_of={c.train.best_of} best and as many worst are more than "
            f"sample.group_size={size}; take at most {size // 2}, or 0 for all"
        )
    if groups in (0, c.sample.groups):
        return 0
    if groups > c.sample.groups:
        raise UserError(
            f"config.train.groups={groups}: only sample.groups={c.sample.groups} are sampled"
        )
    if size % batch:
        raise UserError(
            f"config.train.groups={groups} chooses whole batches: sample.batch_size={batch} must "
            f"divide sample.group_size={size}"
        )
    if c.sample.sde_window == ONE_PER_GROUP:
        raise UserError(
            f"config.train.groups={groups} does not go with sample.sde_window={ONE_PER_GROUP}: the "
            "groups left out would be missing at their steps; use another window, or "
            "train.groups=0"
        )
    return groups * size // batch


def check_forward(c: ml_collections.ConfigDict, values: dict):
    """Of the methods that train on finished videos. values: the settings, flat. Raises `UserError`."""
    method, updates, plain = c.train.method, c.train.updates_per_epoch, flat(defaults().to_dict())
    for key in GRPO_ONLY:
        if values[key] != plain[key]:
            raise UserError(
                f"config.{key}={values[key]} is of Flow-GRPO: set --config.train.method=grpo, or "
                f"with train.method={method} leave it at {plain[key]}"
            )
    if c.train.timesteps > c.sample.steps:
        raise UserError(
            f"config.train.timesteps={c.train.timesteps} must be at most "
            f"sample.steps={c.sample.steps}"
        )
    if c.sample.shared_noise:
        raise UserError(
            f"config.sample.shared_noise=True with train.method={method}: without stochastic steps "
            "all videos of a group would be one; set it to False"
        )
    if method in ("dpo", "sft") and c.sample.groups % updates:
        raise UserError(
            f"config.train.updates_per_epoch={updates} does not divide "
            f"sample.groups={c.sample.groups}: train.method={method} trains on one "
            f"{'pair' if method == 'dpo' else 'video'} of each group"
        )


def kl_weight_of(values: dict) -> float:
    """What train.kl_weight says, or leaves to the method. values: flat."""
    weight = values["train.kl_weight"]
    return KL_WEIGHT.get(values["train.method"], 0.0) if weight is None else weight


def check_resume(saved: dict, now: dict, checkpoint: str):
    """Raises `UserError` when a run's checkpoint was made with other settings than the ones given
    now.
    """
    # a setting newer than the run had its default
    known = flat(defaults().to_dict()) | {"train.method": "grpo"}
    saved, now = (
        {**values, "train.kl_weight": kl_weight_of(values)}
        for values in (known | flat(saved), flat(now))
    )
    changed = [
        f"{k}: {saved.get(k)!r} -> {now.get(k)!r}"
        for k in sorted(saved.keys() | now.keys())
        if not _same(k, saved.get(k), now.get(k))
        and not any(k == f or (f.endswith(".") and k.startswith(f)) for f in FREE)
    ]
    if changed:
        raise UserError(
            f"{checkpoint} was made with other settings ({'; '.join(changed[:6])}); continue with "
            "the same ones, or start a new run with another --config.run_dir"
        )


def _same(key: str, a, b) -> bool:
    """Whether two values of a setting mean the same: of paths, whether they lead to the same place."""
    return a == b or bool(key in PATHS and a and b and expand(a) == expand(b))

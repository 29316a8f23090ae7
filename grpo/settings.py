"""A recipe's ConfigDict, checked and turned into the small dataclasses that the parts take."""

import dataclasses

import jax.numpy as jnp
import ml_collections

from configs.defaults import defaults
from grpo import clip_lengths, sinks
from grpo.advantages import STDS
from grpo.budget import Budget
from grpo.combine import BAD_SIDE, COMBINATIONS, MAIN
from grpo.losses import OBJECTIVES, LossConfig
from grpo.reward_servers import JUDGE, JUDGE_QUESTIONS, check_settings
from grpo.rollout import CREDITS, WINDOWS
from grpo.update import OptimiserConfig
from rewards.clip import KINDS, check_model
from rewards.ocr import RULES
from rewards.ocr_engines import ENGINES
from wan_jax.attention import BACKENDS
from wan_jax.cli import UserError
from wan_jax.experts import OFFLOAD
from wan_jax.lora import LoRAConfig
from wan_jax.schedule import flow_sigmas
from wan_jax.sde import SDEConfig
from wan_jax.solvers import SOLVERS
from wan_jax.transformer import REMAT_POLICIES

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
# |ratio - 1| on policy where train.ratio_tolerance is None. In bfloat16 the two programs may take other kernels for the
# same product and then differ by its rounding: 1e-7 to 6e-6 seen on an H200 at full size, and once 4.6e-4. A wrong step
# or text is far above either.
RATIO_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-3}
REQUIRED = ("run_dir", "model.path", "prompts.train", "prompts.heldout")
CHOICES = {"model.dtype": DTYPES, "model.attention": BACKENDS, "model.remat": REMAT_POLICIES,
           "model.offload": OFFLOAD,
           "sample.sde_window": WINDOWS, "train.credit": CREDITS, "train.objective": OBJECTIVES,
           "train.advantage_std": STDS, "reward.rule": RULES, "reward.engine": (*ENGINES, JUDGE),
           "reward.judge_question": JUDGE_QUESTIONS, "eval.solver": SOLVERS,
           "reward.combine": COMBINATIONS}
AT_LEAST = {"epochs": 1, "lora.rank": 0, "mesh.fsdp": 0, "mesh.context": 0, "sample.frames": 1, "sample.steps": 1,
            "sample.groups": 1, "sample.group_size": 2, "sample.batch_size": 1, "sample.sde_window_epochs": 1,
            "train.updates_per_epoch": 1, "train.warmup_updates": 0,
            "train.weight_decay": 0, "reward.max_frames": 2, "reward.workers": 0,
            "reward.retries": 0, "reward.patience": 0,
            "eval.every": 1, "eval.num_prompts": 2, "eval.frames": 0, "eval.steps": 1, "eval.previews": 0,
            "save.every": 1, "save.keep": 1}
# a resumed run may differ from its checkpoint in these: they do not change what an epoch computes
FREE = ("epochs", "budget.", "run_dir", "eval.", "save.", "reward.workers", "reward.servers", "reward.token_env",
        "reward.timeout", "reward.retries", "reward.patience", "model.path", "model.offload", "prompts.heldout",
        "mesh.", "train.offload_optimiser", "log.", "reward.clip_model", "reward.pickscore_model")


@dataclasses.dataclass(frozen=True)
class Settings:
    dtype: type
    lora: LoRAConfig | None
    sde: SDEConfig
    loss: LossConfig
    optimiser: OptimiserConfig
    videos: int  # an epoch's videos
    batches: int  # an epoch's rollout batches
    ratio_tolerance: float
    weights: dict[str, float]  # of the rewards that are measured
    budget: Budget


def from_config(c: ml_collections.ConfigDict) -> Settings:
    """Checks what can be checked without model or device. Raises `UserError` naming the key, the value and the fix."""
    values = flat(c.to_dict())
    for key in REQUIRED:
        if not values[key]:
            raise UserError(f"config.{key} is empty: set it in the recipe or with --config.{key}=...")
    for key, choices in CHOICES.items():
        if values[key] not in choices:
            raise UserError(f"config.{key}={values[key]!r}: choose one of {', '.join(choices)}")
    for key, least in AT_LEAST.items():
        if not values[key] >= least:
            raise UserError(f"config.{key}={values[key]} must be at least {least}")
    check_settings(c.reward)
    sinks.check(c.log)
    tolerance = c.train.ratio_tolerance
    if tolerance is not None and not tolerance >= 0:
        raise UserError(f"config.train.ratio_tolerance={tolerance} must be at least 0, or None")
    videos = c.sample.groups * c.sample.group_size
    if videos % c.sample.batch_size:
        raise UserError(f"config.sample: groups x group_size = {videos} videos do not fill batches of "
                        f"batch_size={c.sample.batch_size}; choose a divisor of {videos}")
    batches = videos // c.sample.batch_size
    if batches % c.train.updates_per_epoch:
        raise UserError(f"config.train.updates_per_epoch={c.train.updates_per_epoch} does not divide the epoch's "
                        f"{batches} batches")
    if len(c.sample.sde_range) != 2:
        raise UserError(f"config.sample.sde_range={tuple(c.sample.sde_range)} must be (first, last + 1)")
    low, high = c.sample.sde_range
    if not (0 <= low < high <= c.sample.steps and 1 <= c.sample.sde_steps <= high - low):
        raise UserError(f"config.sample: sde_steps={c.sample.sde_steps} steps do not fit in sde_range=({low}, {high}) "
                        f"of {c.sample.steps} steps")
    weights = {k: v for k, v in c.reward.weights.items() if v is not None}
    if not all(v >= 0 for v in weights.values()) or not any(weights.values()) or MAIN not in weights:
        raise UserError(f"config.reward.weights={weights}: weights must be at least 0, not all of them 0, and {MAIN} "
                        "must have one")
    for name in KINDS:
        if name in weights:
            path = c.reward[f"{name}_model"]
            if not path or c.reward.servers:
                raise UserError(f"config.reward.weights.{name} is scored by the workers here: set "
                                f"config.reward.{name}_model={path!r} to the model's folder, and give no "
                                f"config.reward.servers={tuple(c.reward.servers)}")
            try:
                check_model(path)
            except ValueError as error:
                raise UserError(f"config.reward.{name}_model: {error}") from None
    if c.sample.frame_schedule and (quality := set(weights) & set(BAD_SIDE)):
        raise UserError(f"config.reward.weights has {', '.join(sorted(quality))}, which are judged by the base model's "
                        "videos of one length: leave them or config.sample.frame_schedule out")
    if unknown := set(c.train.experts) - {"transformer", "transformer_2"}:
        raise UserError(f"config.train.experts names {', '.join(sorted(unknown))}: choose from transformer and "
                        "transformer_2")
    if c.lora.rank and not c.lora.targets:
        raise UserError("config.lora.targets is empty: name the layers to adapt, or train all weights with lora.rank=0")
    if c.lora.init and not c.lora.rank:
        raise UserError(f"config.lora.init={c.lora.init} needs adapters to start from: set config.lora.rank as in the "
                        "file")
    try:
        flow_sigmas(c.sample.steps, c.sample.shift)
        clip_lengths.check(c.sample.frames, c.sample.frame_schedule, c.eval.frames, c.eval.more_frames)
        return Settings(
            dtype=DTYPES[c.model.dtype],
            lora=LoRAConfig(c.lora.rank, c.lora.alpha, tuple(c.lora.targets)) if c.lora.rank else None,
            sde=SDEConfig(c.sample.sde, c.sample.noise_level, c.sample.max_step_std),
            loss=LossConfig(c.train.clip_low, c.train.clip_high, c.train.kl_weight, c.train.kl_kind,
                            c.train.objective, c.train.divergence),
            optimiser=OptimiserConfig(**{f.name: c.train[f.name] for f in dataclasses.fields(OptimiserConfig)}),
            videos=videos, batches=batches,
            ratio_tolerance=RATIO_TOLERANCE[c.model.dtype] if tolerance is None else tolerance, weights=weights,
            budget=Budget(**c.budget.to_dict()))
    except ValueError as error:
        raise UserError(f"config: {error}") from None


def check_resume(saved: dict, now: dict, checkpoint: str):
    """Raises `UserError` when a run's checkpoint was made with other settings than the ones given now."""
    saved, now = flat(defaults().to_dict()) | flat(saved), flat(now)  # a setting newer than the run had its default
    changed = [f"{k}: {saved.get(k)!r} -> {now.get(k)!r}" for k in sorted(saved.keys() | now.keys())
               if saved.get(k) != now.get(k) and not any(k == f or (f.endswith(".") and k.startswith(f)) for f in FREE)]
    if changed:
        raise UserError(f"{checkpoint} was made with other settings ({'; '.join(changed[:6])}); continue with the same "
                        "ones, or start a new run with another --config.run_dir")


def flat(values: dict, prefix: str = "") -> dict:
    """Nested dicts to {'a.b': value}; tuples become lists, as after JSON."""
    out = {}
    for key, value in values.items():
        if isinstance(value, dict):
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = _listed(value)
    return out


def _listed(value):
    return [_listed(v) for v in value] if isinstance(value, (tuple, list)) else value

"""A recipe's ConfigDict, checked and turned into the small dataclasses that the parts take."""

import dataclasses

import jax.numpy as jnp
import ml_collections

from grpo.losses import LossConfig
from grpo.update import OptimiserConfig
from wan_jax.cli import UserError
from wan_jax.lora import LoRAConfig
from wan_jax.sde import SDEConfig

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
# a resumed run may differ from its checkpoint in these: they do not change what an epoch computes
FREE = ("epochs", "run_dir", "eval.", "save.", "reward.workers", "model.path", "prompts.heldout", "mesh.")


@dataclasses.dataclass(frozen=True)
class Settings:
    dtype: type
    lora: LoRAConfig | None
    sde: SDEConfig
    loss: LossConfig
    optimiser: OptimiserConfig
    videos: int  # an epoch's videos
    batches: int  # an epoch's rollout batches


def from_config(c: ml_collections.ConfigDict) -> Settings:
    """Checks what can be checked without model or device. Raises `UserError` naming the key, the value and the fix."""
    for key in ("run_dir", "model.path", "prompts.train", "prompts.heldout"):
        value = c
        for part in key.split("."):
            value = value[part]
        if not value:
            raise UserError(f"config.{key} is empty: set it in the recipe or with --config.{key}=...")
    if c.model.dtype not in DTYPES:
        raise UserError(f"config.model.dtype={c.model.dtype!r}: choose one of {', '.join(DTYPES)}")
    for section, key in (("sample", "groups"), ("sample", "batch_size"), ("sample", "steps"),
                         ("train", "updates_per_epoch"), ("eval", "num_prompts"), ("eval", "steps"), ("eval", "every"),
                         ("save", "every")):
        if c[section][key] < 1:
            raise UserError(f"config.{section}.{key}={c[section][key]} must be at least 1")
    if c.sample.group_size < 2:
        raise UserError(f"config.sample.group_size={c.sample.group_size}: a group needs 2 videos to compare, 8 or more "
                        "work well")
    videos = c.sample.groups * c.sample.group_size
    if videos % c.sample.batch_size:
        raise UserError(f"config.sample: groups x group_size = {videos} videos do not fill batches of "
                        f"batch_size={c.sample.batch_size}; choose a divisor of {videos}")
    batches = videos // c.sample.batch_size
    if batches % c.train.updates_per_epoch:
        raise UserError(f"config.train.updates_per_epoch={c.train.updates_per_epoch} does not divide the epoch's "
                        f"{batches} batches")
    low, high = c.sample.sde_range
    if not (0 <= low < high <= c.sample.steps and 1 <= c.sample.sde_steps <= high - low):
        raise UserError(f"config.sample: sde_steps={c.sample.sde_steps} steps do not fit in sde_range=({low}, {high}) "
                        f"of {c.sample.steps} steps")
    if c.train.advantage_std not in ("group", "global"):
        raise UserError(f"config.train.advantage_std={c.train.advantage_std!r}: choose 'group' or 'global'")
    try:
        return Settings(
            dtype=DTYPES[c.model.dtype],
            lora=LoRAConfig(c.lora.rank, c.lora.alpha, tuple(c.lora.targets)) if c.lora.rank else None,
            sde=SDEConfig(c.sample.sde, c.sample.noise_level, c.sample.max_step_std),
            loss=LossConfig(c.train.clip_low, c.train.clip_high, c.train.kl_weight, c.train.kl_kind),
            optimiser=OptimiserConfig(**{f.name: c.train[f.name] for f in dataclasses.fields(OptimiserConfig)}),
            videos=videos, batches=batches)
    except ValueError as error:
        raise UserError(f"config: {error}") from None


def check_resume(saved: dict, now: dict, checkpoint: str):
    """Raises `UserError` when a run's checkpoint was made with other settings than the ones given now."""
    saved, now = flat(saved), flat(now)
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
            out[prefix + key] = list(value) if isinstance(value, tuple) else value
    return out

"""Which keys a recipe may have and which values they may take.

Keys and types are those of `configs.defaults`; ranges of numbers are in `LIMITS`. What concerns
several settings at once is checked by `grpo.settings.parse`.
"""

import difflib
import math
import os
import re
import urllib.parse
from collections.abc import Iterator

import ml_collections

from configs.defaults import defaults
from wan_jax.command_line.flag_types import user_path
from wan_jax.command_line.limits import SEED, Range
from wan_jax.errors import UserError

POSITIVE, SHARE = Range(0, above=True), Range(0, 1, below=True)
OPEN = Range(0, math.inf, above=True, below=False)  # infinity switches the bound off
GUIDANCE = Range(0, note="up to 1 means no guidance")
# Every number, and the numbers in tuples.
LIMITS = {
    "seed": SEED,
    "epochs": Range(1),
    "budget.evaluations": POSITIVE,
    "budget.seconds": POSITIVE,
    "lora.rank": Range(0),
    "lora.alpha": Range(0, above=True, note="adapters are scaled by alpha / rank"),
    "mesh.fsdp": Range(0),
    "mesh.context": Range(0),
    "sample.frames": Range(1),
    "sample.height": Range(1),
    "sample.width": Range(1),
    "sample.steps": Range(1),
    "sample.shift": POSITIVE,
    "sample.guidance": GUIDANCE,
    "sample.guidance_2": GUIDANCE,
    "sample.groups": Range(1),
    "sample.group_size": Range(2),
    "sample.batch_size": Range(1),
    "sample.noise_level": Range(0),
    "sample.max_step_std": OPEN,
    "sample.sde_steps": Range(1),
    "sample.sde_range": Range(0),
    "sample.sde_window_epochs": Range(1),
    "train.timesteps": Range(1),
    "train.nft_beta": POSITIVE,
    "train.old_rate": Range(0),
    "train.old_most": SHARE,
    "train.dpo_beta": POSITIVE,
    "train.reference_every": Range(0),
    "train.temperature": POSITIVE,
    "train.groups": Range(0),
    "train.best_of": Range(0),
    "train.updates_per_epoch": Range(1),
    "train.learning_rate": Range(0, 1, above=True, below=True, note="1e-4 is usual"),
    "train.warmup_updates": Range(0),
    "train.adam_b1": SHARE,
    "train.adam_b2": SHARE,
    "train.adam_eps": POSITIVE,
    "train.weight_decay": Range(0),
    "train.max_grad_norm": OPEN,
    "train.ema_decay": SHARE,
    "train.divergence": POSITIVE,
    "train.clip_low": Range(0, 1, above=True),
    "train.clip_high": POSITIVE,
    "train.kl_weight": Range(0),
    "train.kl_reference_decay": SHARE,
    "train.kl_target": POSITIVE,
    "train.kl_horizon": POSITIVE,
    "train.kl_weight_range": POSITIVE,
    "train.cfg_distill_weight": Range(0),
    "train.cfg_distill_guidance": GUIDANCE,
    "train.cfg_distill_guidance_2": GUIDANCE,
    "train.advantage_clip": OPEN,
    "train.ratio_tolerance": Range(0, math.inf, below=False),
    "reward.max_frames": Range(2),
    "reward.workers": Range(0),
    "reward.timeout": POSITIVE,
    "reward.retries": Range(0),
    "reward.patience": Range(0),
    **{f"reward.weights.{name}": Range(0) for name in defaults().reward.weights},
    "eval.every": Range(1),
    "eval.num_prompts": Range(2),
    "eval.frames": Range(0),
    "eval.more_frames": Range(1),
    "eval.steps": Range(1),
    "eval.guidance": GUIDANCE,
    "eval.guidance_2": GUIDANCE,
    "eval.seed": SEED,
    "eval.previews": Range(0),
    "save.every": Range(1),
    "save.keep": Range(1),
}
ELEMENTS = {
    "lora.targets": str,
    "train.experts": str,
    "reward.servers": str,
    "sample.sde_range": int,
    "eval.more_frames": int,
    "train.kl_weight_range": float,
}  # types in tuples
PAIRS = {"sample.sde_range": "(first, last + 1)", "train.kl_weight_range": "(lowest, highest)"}
TYPES = {
    float: "a number",
    int: "a whole number",
    bool: "True or False",
    str: "a text",
    tuple: "a tuple",
}
PATHS = (
    "run_dir",
    "model.path",
    "lora.init",
    "prompts.train",
    "prompts.heldout",
    "reward.clip_model",
    "reward.pickscore_model",
)
VARIABLE = re.compile(r"[A-Z]+\d?(_[A-Z]+\d?)*")  # a name by custom, which no usual token matches


def flat(values: dict, prefix: str = "") -> dict:
    """Nested dicts to {'a.b': value}; tuples become lists, as after JSON."""
    out = {}
    for key, value in values.items():
        if isinstance(value, dict):
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = _listed(value)
    return out


def _listed(value):
    return [_listed(v) for v in value] if isinstance(value, (tuple, list)) else value


def check_keys(c: ml_collections.ConfigDict) -> None:
    """Raise `UserError` when a recipe's keys are not those of `configs.defaults`: it would be read
    past them.
    """
    known = defaults().to_dict()
    unknown = list(_unknown(c.to_dict(), known))
    if unknown:
        guesses = [guess for _, guess in unknown if guess]
        raise UserError(
            f"the recipe sets {', '.join(key for key, _ in unknown)}, which are not settings; "
            + (f"did you mean {', '.join(guesses)}?" if guesses else "see configs/defaults.py")
        )
    missing = sorted(flat(known).keys() - flat(c.to_dict()).keys())
    if missing:
        raise UserError(
            f"the recipe does not set {', '.join(missing[:6])}: let it begin with c = defaults(), "
            "of configs/defaults.py"
        )


def _unknown(values: dict, known: dict, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield each key that is not in `known`, with '.*' after sections, and the most similar one
    that is, or ''.
    """
    for key, value in values.items():
        if key not in known:
            same_kind = [
                k for k, v in known.items() if isinstance(v, dict) == isinstance(value, dict)
            ]
            guess = difflib.get_close_matches(str(key), same_kind, n=1)
            end = ".*" if isinstance(value, dict) else ""
            yield f"{prefix}{key}{end}", f"{prefix}{guess[0]}{end}" if guess else ""
        elif isinstance(value, dict) and isinstance(known[key], dict):
            yield from _unknown(value, known[key], f"{prefix}{key}.")


def normalise(c: ml_collections.ConfigDict) -> None:
    """Write settings in `c` the one way the rest of the program reads them.

    'None' for an optional text is the empty text, and (None,) or ('',), as the command line makes
    of 'None' and nothing, is the empty tuple. Paths become what
    `wan_jax.command_line.flag_types.user_path` says. Raises `UserError` on one that cannot be a
    path.
    """
    values = flat(c.to_dict())
    for key, default in flat(defaults().to_dict()).items():
        value = values[key]
        if default == "" and value == "None":
            _set(c, key, "")
        elif isinstance(default, list) and value in ([None], [""]):
            _set(c, key, ())
        elif key in PATHS and isinstance(value, str):
            _set(c, key, user_path(value))


def _set(c: ml_collections.ConfigDict, key: str, value) -> None:
    *sections, name = key.split(".")
    for section in sections:
        c = c[section]
    c[name] = value


def check_values(c: ml_collections.ConfigDict) -> None:
    """Raise `UserError` that names every setting whose type or range is wrong."""
    plain, values = defaults(), flat(c.to_dict())
    problems = []
    for key, default in flat(plain.to_dict()).items():
        value, kind = values[key], _type_of(plain, key)
        if value is None and default is None:
            continue
        optional = ", or None" if default is None else ""
        items, name = (
            ([value], TYPES[kind])
            if kind is not tuple
            else (value, f"a tuple, each of it {_element(key)}")
        )
        if kind is tuple and not isinstance(value, list):
            problems.append(f"config.{key}={value!r} must be a tuple")
        elif not all(
            _is(ELEMENTS.get(key, object) if kind is tuple else kind, item) for item in items
        ):
            problems.append(f"config.{key}={_shown(value)} must be {name}{optional}")
        elif key in PAIRS and len(value) != 2:
            problems.append(f"config.{key}={_shown(value)} must be {PAIRS[key]}")
        elif key in LIMITS and (outside := [item for item in items if item not in LIMITS[key]]):
            problems.append(
                f"config.{key}={_shown(value)} {LIMITS[key].requirement(outside[0])}{optional}"
            )
    if problems:
        raise UserError("; ".join(problems))


def _type_of(c: ml_collections.ConfigDict, key: str) -> type:
    *sections, name = key.split(".")
    for section in sections:
        c = c[section]
    return c.get_type(name)


def _element(key: str) -> str:
    return TYPES[ELEMENTS[key]] if key in ELEMENTS else "a pair"


def _is(kind: type, value) -> bool:
    """Whether `value` may stand for one of `kind`: whole numbers for floats, but truth values for
    no number.
    """
    if isinstance(value, bool):
        return kind in (bool, object)
    return isinstance(value, (int, float) if kind is float else kind)


def _shown(value) -> str:
    return (
        f"({', '.join(map(repr, value))}{',' * (len(value) == 1)})"
        if isinstance(value, list)
        else repr(value)
    )


def check_secrets(c: ml_collections.ConfigDict) -> None:
    """Raise `UserError`, without repeating it, when a setting holds what no file of the run may
    hold.
    """
    address = c.log.mlflow.uri
    if _has_credentials(address):
        raise UserError(
            "config.log.mlflow.uri has a name or a password in it, which the run's files would "
            "keep: leave it out and set the environment variables MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD; where it is that of a database, give the address of a "
            "server of MLflow that opens it"
        )
    name = c.reward.token_env
    if name not in os.environ and not VARIABLE.fullmatch(name):
        raise UserError(
            "config.reward.token_env must be the name of an environment variable that is set, or "
            "a name in upper case such as REWARD_TOKEN, never the token itself"
        )


def _has_credentials(url: str) -> bool:
    """Whether a URL names a user or a password, before its host or as an option."""
    try:
        parts = urllib.parse.urlsplit(url)
        options = {key.lower() for key in urllib.parse.parse_qs(parts.query)}
    except ValueError:
        return "@" in url
    return "@" in parts.netloc or bool(
        options & {"user", "username", "password", "passwd", "token", "access_token"}
    )

"""Check of a recipe's ConfigDict against the declared settings: keys, types, ranges, secrets.

`grpo.settings.checks` has the checks of several settings together.
"""

import difflib
import os
import re
import urllib.parse
from collections.abc import Iterator, Mapping
from typing import Any

import ml_collections

from grpo.settings.named import own_names, pairs
from grpo.settings.schema import BUILT_IN, SETTINGS, Recipe, as_tuples
from grpo.settings.setting import Setting
from wan_jax.command_line.flag_types import user_path
from wan_jax.errors import UserError

TYPES = {
    float: "a number",
    int: "a whole number",
    bool: "True or False",
    str: "a text",
    tuple: "a pair",
}
# names of environment variables as they usually are; no token matches
VARIABLE = re.compile(r"[A-Z]+\d?(_[A-Z]+\d?)*")


def flat(values: Mapping, prefix: str = "") -> dict[str, object]:
    """Return nested dicts as {'a.b': value}, with tuples as lists, as after JSON."""
    flattened = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flattened |= flat(value, f"{prefix}{key}.")
        else:
            flattened[f"{prefix}{key}"] = _as_lists(value)
    return flattened


def _as_lists(value):
    return [_as_lists(v) for v in value] if isinstance(value, (tuple, list)) else value


def check_keys(config: ml_collections.ConfigDict) -> None:
    """Raises `UserError` with similar keys where a recipe does not have exactly the declared keys.
    Weights of the user's own rewards are allowed too (`own_weights`).
    """
    values = config.to_dict()
    own_weights(values)  # removes them
    unknown = list(_unknown(values, Recipe().to_dict()))
    if unknown:
        guesses = [guess for _, guess in unknown if guess]
        raise UserError(
            f"the recipe sets {', '.join(key for key, _ in unknown)}, which are not settings; "
            + (
                f"did you mean {', '.join(guesses)}?"
                if guesses
                else "see docs/reference/settings.md"
            )
        )
    missing = sorted(key for key in SETTINGS if not _has(values, key))
    if missing:
        raise UserError(
            f"the recipe does not set {', '.join(missing[:6])}: let it begin with c = defaults(), "
            "of configs/defaults.py"
        )


def _has(values: Any, key: str) -> bool:
    """Return whether nested settings have a key, e.g. 'train.learning_rate'."""
    for name in key.split("."):
        if not isinstance(values, dict) or name not in values:
            return False
        values = values[name]
    return True


def own_weights(values: dict[str, Any]) -> dict[str, Any]:
    """Remove the weights of the user's own rewards from nested settings and return them by name.

    values: of a recipe's ConfigDict, from `to_dict`.
    """
    reward = values.get("reward", {})
    weights = reward.get("weights") if isinstance(reward, dict) else None
    if not isinstance(weights, dict):
        return {}
    try:
        names = own_names(reward.get("own"), as_tuples(reward.get("servers") or ()))
    except ValueError:  # reported by `normalised`
        names = list(weights)
    return {name: weights.pop(name) for name in names if name in weights and name not in BUILT_IN}


def with_own_weights(values: dict[str, Any], nested: dict[str, Any]) -> dict[str, Any]:
    """Return normalised values with the weights of the user's own rewards that a recipe sets as
    reward.weights.NAME. Those of reward.own_weights, which the command line gives, win.

    nested: the settings of the recipe, from `to_dict` of its ConfigDict. Raises `UserError`.
    """
    key = "reward.own_weights"
    added = own_weights(nested)
    try:
        merged = dict(pairs(added, float)) | dict(values[key])
    except ValueError as error:
        raise UserError(f"config.reward.weights={added} {error}") from None
    return values | {key: tuple(merged.items())}


def _unknown(values: dict, known: dict, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yields (key, similar key or '') of all keys that are not in `known`, with '.*' after sections."""
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


def normalised(values: Mapping[str, object]) -> dict[str, object]:
    """Return the values of all settings in one form.

    'None' becomes the empty text where a text may be empty. (None,) and ('',), which the command line
    makes of 'None' and of an empty value, become the empty tuple. Paths become those of
    `wan_jax.command_line.flag_types.user_path`. Values by name become pairs. Raises `UserError` on a
    text that cannot be a path, and on values by name in another form.
    """
    return {key: _normalised(SETTINGS[key], as_tuples(value)) for key, value in values.items()}


def _normalised(entry: Setting, value):
    if entry.named is not None:
        try:
            return pairs(value, entry.named)
        except ValueError as error:
            raise UserError(f"config.{entry.key}={value!r} {error}") from None
    if entry.default == "" and value == "None":
        return ""
    if entry.kind is tuple and value in ((None,), ("",)):
        return ()
    return user_path(value) if entry.path and isinstance(value, str) else value


def check_values(values: Mapping[str, object]) -> None:
    """Raises `UserError` with all settings that have a wrong type or a value that is not allowed."""
    problems = [
        f"config.{key}={values[key]!r} {problem}"
        for key, entry in SETTINGS.items()
        if (problem := _problem(entry, values[key]))
    ]
    if problems:
        raise UserError("; ".join(problems))


def _problem(entry: Setting, value) -> str:
    """Return the requirement that a value does not meet, as text; '' where it meets all."""
    if value is None and entry.optional:
        return ""
    optional = ", or None" if entry.optional else ""
    items: tuple[Any, ...]
    if entry.kind is not tuple:
        items, kind, name = (value,), entry.kind, TYPES[entry.kind]
    elif not isinstance(value, tuple):
        return "must be a tuple"
    else:
        assert entry.elements is not None, entry.key
        items, kind = value, entry.elements
        nested = kind is tuple and entry.form
        form = (entry.form or "").split(" or ")[0]
        name = f"a tuple, each of it {entry.form if nested else TYPES[kind]}"
        if nested:
            name += f": ({form},) for one"
    if not all(_is(kind, item) for item in items):
        return f"must be {name}{optional}"
    if entry.length and len(items) != entry.length:
        return f"must be {entry.form}"
    for item in items:
        if entry.bounds and item not in entry.bounds:
            return f"{entry.bounds.requirement(item)}{optional}"
    if entry.choices and not set(items) <= set(entry.choices):
        return f"must be one of {', '.join(entry.choices)}"
    return ""


def _is(kind: type, value) -> bool:
    """Return whether a value has the type `kind`. A whole number is also a float; True and False are
    no numbers.
    """
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def check_required(values: Mapping[str, object]) -> None:
    """Raises `UserError` where a setting without a usable default is not set."""
    for key, entry in SETTINGS.items():
        if entry.required and not values[key]:
            raise UserError(
                f"config.{key} is empty: set it in the recipe or with --config.{key}=..."
            )


def check_secrets(recipe) -> None:
    """Raises `UserError` where a setting has a secret, which the files of the run would contain. The
    message does not contain it.
    """
    address = recipe.log.mlflow.uri
    if _has_credentials(address):
        raise UserError(
            "config.log.mlflow.uri has a name or a password in it, which the run's files would "
            "keep: leave it out and set the environment variables MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD; for a database, give the address of an MLflow server that "
            "uses it"
        )
    name = recipe.reward.token_env
    if name not in os.environ and not VARIABLE.fullmatch(name):
        raise UserError(
            "config.reward.token_env must be the name of an environment variable that is set, or "
            "a name in upper case such as REWARD_TOKEN, never the token itself"
        )


def _has_credentials(url: str) -> bool:
    """Return whether a URL contains a user or a password, before its host or as an option."""
    try:
        parts = urllib.parse.urlsplit(url)
        options = {key.lower() for key in urllib.parse.parse_qs(parts.query)}
    except ValueError:
        return "@" in url
    return "@" in parts.netloc or bool(
        options & {"user", "username", "password", "passwd", "token", "access_token"}
    )

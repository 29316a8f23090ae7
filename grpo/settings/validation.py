"""Checks of a recipe's ConfigDict against the declared settings: keys, types, ranges, secrets.

What concerns several settings at once is checked by `grpo.settings.checks`.
"""

import difflib
import os
import re
import urllib.parse
from collections.abc import Iterator, Mapping

import ml_collections

from grpo.settings.schema import SETTINGS, Recipe, as_tuples
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
VARIABLE = re.compile(r"[A-Z]+\d?(_[A-Z]+\d?)*")  # names of variables by custom; no token matches


def flat(values: Mapping, prefix: str = "") -> dict[str, object]:
    """Returns nested dicts as {'a.b': value}, with tuples as lists, as after JSON."""
    found = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = _as_lists(value)
    return found


def _as_lists(value):
    return [_as_lists(v) for v in value] if isinstance(value, (tuple, list)) else value


def check_keys(c: ml_collections.ConfigDict) -> None:
    """Checks that a recipe has exactly the declared keys. Raises `UserError` with the nearest ones."""
    unknown = list(_unknown(c.to_dict(), Recipe().to_dict()))
    if unknown:
        guesses = [guess for _, guess in unknown if guess]
        raise UserError(
            f"the recipe sets {', '.join(key for key, _ in unknown)}, which are not settings; "
            + (f"did you mean {', '.join(guesses)}?" if guesses else "see docs/settings.md")
        )
    missing = sorted(SETTINGS.keys() - flat(c.to_dict()).keys())
    if missing:
        raise UserError(
            f"the recipe does not set {', '.join(missing[:6])}: let it begin with c = defaults(), "
            "of configs/defaults.py"
        )


def _unknown(values: dict, known: dict, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yields each key that is not in `known`, with '.*' after sections, and the most similar key
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


def normalised(values: Mapping[str, object]) -> dict[str, object]:
    """Returns the values of all settings in the one form that the rest of the program reads.

    'None' for a text that may be empty is the empty text. (None,) and ('',), which the command line
    makes of 'None' and of nothing, are the empty tuple. Paths are those of
    `wan_jax.command_line.flag_types.user_path`. Raises `UserError` on what cannot be a path.
    """
    return {key: _normalised(SETTINGS[key], as_tuples(value)) for key, value in values.items()}


def _normalised(entry: Setting, value):
    if entry.default == "" and value == "None":
        return ""
    if entry.kind is tuple and value in ((None,), ("",)):
        return ()
    return user_path(value) if entry.path and isinstance(value, str) else value


def check_values(values: Mapping[str, object]) -> None:
    """Checks type, range and choice of every setting. Raises `UserError` that names all wrong ones."""
    problems = [
        f"config.{key}={values[key]!r} {problem}"
        for key, entry in SETTINGS.items()
        if (problem := _problem(entry, values[key]))
    ]
    if problems:
        raise UserError("; ".join(problems))


def _problem(entry: Setting, value) -> str:
    """Says what a value must be where it is not; '' where it is."""
    if value is None and entry.optional:
        return ""
    optional = ", or None" if entry.optional else ""
    if entry.kind is not tuple:
        items, kind, name = (value,), entry.kind, TYPES[entry.kind]
    elif not isinstance(value, tuple):
        return "must be a tuple"
    else:
        items, kind = value, entry.elements
        name = f"a tuple, each of it {TYPES[kind]}"
    if not all(_is(kind, item) for item in items):
        return f"must be {name}{optional}"
    if entry.length and len(items) != entry.length:
        return f"must be {entry.form}"
    if entry.bounds and (outside := [item for item in items if item not in entry.bounds]):
        return f"{entry.bounds.requirement(outside[0])}{optional}"
    if entry.choices and not set(items) <= set(entry.choices):
        return f"must be one of {', '.join(entry.choices)}"
    return ""


def _is(kind: type, value) -> bool:
    """Whether a value may stand for one of `kind`: a whole number for a float, but a truth value for
    no number.
    """
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def check_required(values: Mapping[str, object]) -> None:
    """Checks that the settings without a usable default are set. Raises `UserError`."""
    for key, entry in SETTINGS.items():
        if entry.required and not values[key]:
            raise UserError(
                f"config.{key} is empty: set it in the recipe or with --config.{key}=..."
            )


def check_secrets(recipe) -> None:
    """Checks that no setting holds what no file of the run may hold. Raises `UserError`, which does
    not repeat it.
    """
    address = recipe.log.mlflow.uri
    if _has_credentials(address):
        raise UserError(
            "config.log.mlflow.uri has a name or a password in it, which the run's files would "
            "keep: leave it out and set the environment variables MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD; where it is that of a database, give the address of a "
            "server of MLflow that opens it"
        )
    name = recipe.reward.token_env
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

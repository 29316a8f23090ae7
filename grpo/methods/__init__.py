"""The training methods, one file each. `train.method` is the name of a file. Importing this module
does not import JAX.
"""

import functools
import importlib
import pathlib

from grpo.learning.method import Method
from wan_jax.errors import UserError


@functools.cache
def names() -> tuple[str, ...]:
    """Return the names of all methods."""
    return tuple(sorted(p.stem for p in pathlib.Path(__file__).parent.glob("[a-z]*.py")))


def method_class(name: str) -> type[Method]:
    """Return the class of a method."""
    method = importlib.import_module(f"{__name__}.{name}").METHOD
    assert method.name == name, f"{method.__module__} names its method {method.name!r}"
    return method


def all_methods() -> list[type[Method]]:
    """Return the classes of all methods."""
    return [method_class(name) for name in names()]


def kl_weight(name: str, weight: float | None) -> float:
    """Return `weight`, the value of `train.kl_weight`, or where it is None a method's default."""
    return method_class(name).default_kl_weight if weight is None else weight


def check_variants(recipe) -> None:
    """Raise `UserError` where a setting that chooses a variant of another method does not have its
    default value, because the run would not be of that variant.

    recipe: a `grpo.settings.schema.Recipe`, or a ConfigDict with the same keys.
    """
    from grpo.settings.schema import SETTINGS, values_of

    name, values = recipe.train.method, values_of(recipe)
    for method in all_methods():
        for key in set(method.variants) - set(method_class(name).variants):
            if values[key] != SETTINGS[key].default:
                raise UserError(
                    f"config.{key}={values[key]} belongs to train.method={method.name}: set "
                    f"--config.train.method={method.name}, or with train.method={name} leave it at "
                    f"{SETTINGS[key].default}"
                )

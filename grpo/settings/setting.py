"""Declaration of a recipe's settings: a dataclass field with type, default, range and meaning."""

import dataclasses
import math
import types
import typing
from collections.abc import Iterator

from wan_jax.command_line.limits import Range

POSITIVE = Range(0, above=True)
POSITIVE_OR_INF = Range(0, math.inf, above=True, below=False)  # infinity switches a bound off
FRACTION = Range(0, 1, below=True)
GUIDANCE = Range(0, note="up to 1 means no guidance")
# Marks of settings, and of the sections whose settings all have them (`Setting`).
RESUME = {"resume": True}
PER_PROCESS = {"resume": True, "per_process": True}


class Section:
    """Base of the sections of a recipe: `section["name"]` reads the same as `section.name`."""

    def __getitem__(self, name: str):
        return getattr(self, name)


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting, as its field declares it.

    Attributes:
        key: e.g. 'train.learning_rate'.
        default: the value of `configs.defaults.defaults()`.
        kind: int, float, bool, str or tuple.
        optional: whether None is a value.
        elements: of a tuple, the type of each element; tuple where the elements are pairs.
        length: of a tuple of fixed length, the number of elements.
        meaning: what it does, its unit and its special values.
        choices: of a text or a tuple of texts, the values that are allowed; empty: any.
        bounds: of a number or a tuple of numbers, the range of each; None: any.
        form: of a tuple of fixed length, what the elements are, e.g. '(lowest, highest)'; of a tuple of
            tuples, what those are unless they are pairs.
        named: of values by name, the type of each value, str or float; None: not by name. Recipes
            and the command line may give them in every form that `grpo.settings.named` reads.
        path: whether it is a path, which may begin with `~`.
        required: whether a recipe must set it.
        resume: whether a run that is continued may change it, because it does not change what an
            epoch computes, or only the size of its updates. The change is printed and recorded.
        per_process: whether the processes of a run on several hosts may differ in it.
        experimental: whether no gain by it has been measured; or the values for which that holds.
    """

    key: str
    default: object
    kind: type
    optional: bool
    elements: type | None
    length: int | None
    meaning: str
    choices: tuple[str, ...] = ()
    bounds: Range | None = None
    form: str = ""
    named: type | None = None
    path: bool = False
    required: bool = False
    resume: bool = False
    per_process: bool = False
    experimental: bool | tuple[str, ...] = False


def setting(default, meaning: str, **details):
    """Declares a setting as a field of a section. details: further attributes of `Setting`."""
    return dataclasses.field(default=default, metadata={"meaning": meaning, **details})


def declared(kind: type, prefix: str = "", **marks) -> Iterator[Setting]:
    """Yields every setting of a section and of the sections in it, in the order of declaration.

    prefix: of the keys. marks: those of the sections around it, from the metadata of their fields.
    """
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        key, hint = f"{prefix}{field.name}", hints[field.name]
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            yield from declared(hint, f"{key}.", **{**marks, **field.metadata})
        else:
            yield Setting(key, field.default, *_type_of(hint), **{**marks, **field.metadata})


def _type_of(hint) -> tuple[type, bool, type | None, int | None]:
    """Return (kind, optional, elements, length) of `Setting` for a field's annotation."""
    optional = isinstance(hint, types.UnionType)
    if optional:
        (hint,) = (part for part in typing.get_args(hint) if part is not types.NoneType)
    if typing.get_origin(hint) is not tuple:
        return hint, optional, None, None
    elements = typing.get_args(hint)
    length = None if elements[-1] is Ellipsis else len(elements)
    return tuple, optional, typing.get_origin(elements[0]) or elements[0], length

"""Flags with checked values and expanded paths, while the command line is parsed."""

from collections.abc import Mapping

from absl import flags

from wan_jax.command_line.limits import Range
from wan_jax.errors import UserError
from wan_jax.storage.paths import expand


class NumberParser(flags.ArgumentParser):
    """Parse a number of `kind` (int or float) in `limits`."""

    def __init__(self, kind: type, limits: Range):
        super().__init__()
        self.kind, self.limits = kind, limits
        self.syntactic_help = f"a {'whole ' if kind is int else ''}number"

    def parse(self, argument):
        """Return the number. Raises ValueError."""
        try:
            value = self.kind(argument)
        except ValueError:
            raise ValueError(f"must be {self.syntactic_help}") from None
        if value not in self.limits:
            raise ValueError(self.limits.requirement(value))
        return value

    def flag_type(self) -> str:
        return self.kind.__name__


def user_path(text: str) -> str:
    """Return a path that a user gave, in the form that the rest of the program uses.

    A path with `~` or `..` becomes absolute; others are not changed, so that a stored path remains
    valid when a project folder is moved. Raises `UserError` on text that cannot be a path.
    """
    return str(expand(text)) if text.startswith("~") or ".." in text.split("/") else text


def check_used(values: flags.FlagValues, without_effect: Mapping[str, str]) -> None:
    """Raise `UserError` when a flag is given that has no effect.

    without_effect: such flags, each with what it needs.
    """
    for name, needed in without_effect.items():
        if values[name].present:
            raise UserError(
                f"--{name} has no effect here, it needs {needed}: give that, or leave out --{name}"
            )


class PathParser(flags.ArgumentParser):
    """Parse a path as `user_path` does."""

    def parse(self, argument):
        """Return the path. Raises ValueError."""
        if not str(argument):
            raise ValueError("is empty; give a path")
        try:
            return user_path(argument)
        except UserError as error:
            raise ValueError(str(error)) from None

    def flag_type(self) -> str:
        return "path"


def define_number(
    name: str, default: float | None, help_text: str, limits: Range, kind: type = float
):
    """Define the flag --NAME of a number in `limits`; None is possible only as the default."""
    return flags.DEFINE(
        NumberParser(kind, limits), name, default, help_text, serializer=flags.ArgumentSerializer()
    )


def define_path(name: str, help_text: str, required: bool = False):
    """Define the flag --NAME of a path, None if it is not given."""
    return flags.DEFINE(
        PathParser(),
        name,
        None,
        help_text,
        serializer=flags.ArgumentSerializer(),
        required=required,
    )

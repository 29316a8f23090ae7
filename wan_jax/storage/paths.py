"""Paths as users type them, made absolute, and checks on a pair of them."""

import pathlib

from wan_jax.errors import UserError


def expand(path) -> pathlib.Path:
    """Return `path` as an absolute path: `~` becomes the home folder, symlinks and `..` are
    resolved.

    The path need not exist. (A shell does not expand `~` after the equals sign of
    `--dst=~/models`.) Raises `UserError` on empty text, an unknown user after `~`, a loop of
    symlinks, and characters that no path can contain.
    """
    if path == "":
        raise UserError("'' cannot be used as a path: it is empty")
    try:
        return pathlib.Path(path).expanduser().resolve()
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(f"{str(path)!r} cannot be used as a path: {error}") from None


def check_apart(source, destination) -> None:
    """Raise `UserError` when `destination` is `source`, is inside it or contains it, so that
    writing would destroy it.
    """
    source, destination = expand(source), expand(destination)
    if destination == source:
        relation = "is the source itself"
    elif destination.is_relative_to(source):
        relation = f"is inside the source {source}"
    elif source.is_relative_to(destination):
        relation = f"contains the source {source}"
    else:
        return
    raise UserError(
        f"the destination {destination} {relation}, and writing there would destroy it; choose "
        "another --dst"
    )

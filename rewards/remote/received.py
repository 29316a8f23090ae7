"""JSON and text that other machines sent."""

import json
from typing import Any

LEVELS = 64  # of arrays and objects within each other; far below what Python's recursion allows


def load_json(text: bytes) -> Any:
    """Raises ValueError for what is not JSON in UTF-8, or is nested deeper than LEVELS: code that
    follows the structure can rely on that.
    """
    try:
        value = json.loads(text.decode())
    except RecursionError:
        raise ValueError(f"nested deeper than {LEVELS} levels") from None
    _check_levels(value, LEVELS)
    return value


def _check_levels(value: Any, levels: int) -> None:
    if isinstance(value, list | dict):
        if levels == 0:
            raise ValueError(f"nested deeper than {LEVELS} levels")
        for item in value.values() if isinstance(value, dict) else value:
            _check_levels(item, levels - 1)


def printable(text: str, length: int = 500) -> str:
    """The beginning of a text on one line, without characters that control a terminal; for logs and
    messages.
    """
    return "".join(char if char.isprintable() else " " for char in text[:length]).strip()

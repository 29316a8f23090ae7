"""Settings that hold values by name: `reward.own`, `reward.own_weights`, `reward.servers`.

The first two may be given as a dict, also nested, {"va": {"VQ": 1.0}} for va.VQ; as pairs; and, on the command
line, as the text NAME=VALUE,NAME=VALUE. A checked recipe has them as a tuple of pairs.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

TEXT = "ocr"  # the reward of servers without a name
_NAMED_URL = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)


def servers_by_name(servers: Any) -> dict[str, tuple[str, ...]]:
    """Return the URLs of `reward.servers` by the name of their reward, in the order given."""
    found: dict[str, list[str]] = {}
    for server in servers:
        match = _NAMED_URL.fullmatch(str(server))
        name, url = match.groups() if match else (TEXT, server)
        found.setdefault(name, []).append(url)
    return {name: tuple(urls) for name, urls in found.items()}


def own_names(own: Any, servers: Any) -> list[str]:
    """Return the names of the rewards that a recipe adds: of `reward.own`, then of named servers."""
    named = [name for name in servers_by_name(servers) if name != TEXT]
    return [*(name for name, _ in pairs(own, str)), *named]


def pairs(value: Any, kind: type) -> tuple[tuple[str, Any], ...]:
    """Return the values by name as pairs, in their order; values of the type `kind`, str or float.

    Raises `ValueError` where it has another form, or a name twice.
    """
    if value is None or value in ("", "None"):
        value = ()
    found = tuple(
        (name.strip(), _typed(name, item, kind))
        for name, item in (_of_dict(value) if isinstance(value, Mapping) else _of_items(value))
    )
    names = [name for name, _ in found]
    if len(set(names)) < len(names):
        raise ValueError(f"has a name twice: {', '.join(names)}")
    return found


def _of_dict(values: Mapping, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _of_dict(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _of_items(value: Any) -> Iterator[tuple[str, Any]]:
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, list | tuple):
        raise ValueError("must be NAME=VALUE,NAME=VALUE or a dict by name")
    for item in items:
        name, equals, text = item.partition("=") if isinstance(item, str) else ("", "", "")
        if isinstance(item, list | tuple) and len(item) == 2 and isinstance(item[0], str):
            yield item[0], item[1]
        elif equals and name.strip():
            yield name, text.strip()
        elif item:
            raise ValueError(f"has {item!r}, which is not NAME=VALUE")


def _typed(name: str, value: Any, kind: type) -> Any:
    try:
        if isinstance(value, str) or (kind is float and isinstance(value, int | float)):
            return kind(value)
    except ValueError:
        pass
    expected = "a number" if kind is float else "a text"
    raise ValueError(f"has {value!r} for {name}, which is not {expected}")

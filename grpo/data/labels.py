"""Labels of data: which of two clips is preferred, or what each clip is worth.

A file of JSON lines names items of a folder of data (`latent_folder.Item.name`: the file's name, or
`sample_000012`):

    {"preferred": "a.png", "rejected": "b.png"}    a pair a line
    {"file": "a.png", "score": 0.5}                a rating a line

The two of a pair have one prompt, since each item is trained under its own. A line may repeat it as
"prompt", which is then compared.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from grpo.data.latent_folder import LatentData
from wan_jax.command_line import cli
from wan_jax.errors import UserError
from wan_jax.storage.paths import expand

ITEMS, PAIRS, RATINGS = "items", "pairs", "ratings"  # what a method can train on, of data alone
LINES = {
    PAIRS: '{"preferred": "a.png", "rejected": "b.png"}',
    RATINGS: '{"file": "a.png", "score": 0.5}',
}


@dataclasses.dataclass(frozen=True)
class Labels:
    """R pairs or ratings of the items of a folder.

    Attributes:
        kind: PAIRS or RATINGS.
        items: int [R], numbers of the preferred or rated items.
        rejected: int [R], numbers of the other items of pairs; None: ratings.
        scores: float64 [R], of ratings; None: pairs.
        digest: SHA-256 of these values.
    """

    kind: str
    items: np.ndarray
    rejected: np.ndarray | None
    scores: np.ndarray | None
    digest: str

    def __len__(self) -> int:
        return len(self.items)

    def __str__(self) -> str:
        return f"{len(self)} {self.kind} of them ({self.digest[:12]})"


def read_labels(path: str, data: LatentData, kind: str) -> Labels:
    """Return the labels in a file. kind: PAIRS or RATINGS, which the run's method needs.

    Raises `UserError` with the number of the line where a line is something else, names an item that
    the data lack, has an item twice, or has two items of different prompts or shapes; and where the
    file has no label, or ratings that are all equal.
    """
    form = f"give a line {LINES[kind]} for each of the {kind}"
    text = cli.read_text(expand(path), "config.data.labels", form)
    numbers = {item.name: number for number, item in enumerate(data.items)}
    rows, line_of = [], {}
    for line, content in enumerate(text.split("\n"), 1):
        if not content.strip():
            continue
        try:
            fields = _fields(content, kind)
            names = [fields[key] for key in ("preferred", "rejected", "file") if key in fields]
            chosen = [_number(numbers, name, data) for name in names]
            _check_items(data, chosen, fields.get("prompt"))
            if kind == RATINGS and names[0] in line_of:
                raise ValueError(f"{names[0]!r} has a score already, in line {line_of[names[0]]}")
        except ValueError as error:
            raise UserError(f"config.data.labels={path}, line {line}: {error}") from None
        line_of[names[0]] = line
        rows.append((*chosen, fields["score"]) if kind == RATINGS else chosen)
    if not rows:
        raise UserError(f"config.data.labels={path} has no line: {form}")
    first, second = map(np.array, zip(*rows))
    if kind == RATINGS and np.ptp(second) == 0:
        raise UserError(
            f"config.data.labels={path}: all {len(rows)} scores are {second[0]:g}, so no clip is better "
            "than another; rate the clips differently"
        )
    digest = hashlib.sha256(json.dumps([kind, rows]).encode()).hexdigest()
    if kind == PAIRS:
        return Labels(kind, first, second, None, digest)
    return Labels(kind, first, None, second.astype(np.float64), digest)


def _fields(content: str, kind: str) -> dict[str, Any]:
    """Return the fields of a line. Raises ValueError where it is no label of this kind."""
    try:
        fields = json.loads(content)
    except ValueError as error:
        raise ValueError(f"not JSON ({error}); a line is {LINES[kind]}") from None
    wanted = {key: type(value) for key, value in json.loads(LINES[kind]).items()}
    allowed = {str: str, float: (int, float)}
    if (
        not isinstance(fields, dict)
        or fields.keys() - {"prompt"} != wanted.keys()
        or any(not isinstance(fields[k], allowed[t]) for k, t in wanted.items())
        or isinstance(fields.get("score"), bool)
    ):
        raise ValueError(f"a line is {LINES[kind]}, it is {content.strip()[:80]!r}")
    if not math.isfinite(fields.get("score", 0.0)):
        raise ValueError(f"score {fields['score']} is not finite")
    return fields


def _number(numbers: Mapping[str, int], name: str, data: LatentData) -> int:
    """Return the number of an item. Raises ValueError where the data lack it."""
    if name not in numbers:
        raise ValueError(
            f"{name!r} is not among the {len(data)} items of {data.folder}, e.g. {data.items[0].name!r}"
        )
    return numbers[name]


def _check_items(data: LatentData, chosen: list[int], prompt: object) -> None:
    """Raise ValueError where the items of a line cannot be compared. prompt: that the line repeats."""
    items = [data.items[number] for number in chosen]
    names = " and ".join(repr(item.name) for item in items)
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"{names} are the same file: a pair has two")
    prompts = [item.prompt for item in items]
    if len(set(prompts)) > 1:
        raise ValueError(
            f"{names} have different prompts, {prompts[0]!r} and {prompts[1]!r}: a pair has one"
        )
    if prompt not in (None, prompts[0]):
        raise ValueError(f"{names} was encoded with the prompt {prompts[0]!r}, not {prompt!r}")
    shapes = [data.shape_of(number) for number in chosen]
    if len(set(shapes)) > 1:
        raise ValueError(f"{names} have latents of {list(shapes[0])} and {list(shapes[1])}")

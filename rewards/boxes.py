"""Rectangles around the text in frames, in shares of the frame's sides."""

from collections.abc import Sequence

import numpy as np

from rewards.base import Box


def around(corners: Sequence[tuple[float, float]], height: int, width: int) -> Box:
    """Return the upright rectangle around corners (x, y) in pixels of a frame, cut at its sides."""
    xs, ys = (
        np.clip(values, 0, size) / size for values, size in zip(zip(*corners), (width, height))
    )
    return float(xs.min()), float(ys.min()), float(xs.max()), float(ys.max())


def union_area(boxes: Sequence[Box]) -> float:
    """Return the share of the frame that is inside at least one box, 0 to 1."""
    if not boxes:
        return 0.0
    sides = np.array(boxes, np.float64)
    xs, ys = np.unique(sides[:, ::2]), np.unique(sides[:, 1::2])
    covered = np.zeros((len(ys) - 1, len(xs) - 1), bool)  # of the grid that all sides make
    for left, top, right, bottom in sides:
        columns = slice(*np.searchsorted(xs, (left, right)))
        covered[slice(*np.searchsorted(ys, (top, bottom))), columns] = True
    return float(np.diff(ys) @ covered @ np.diff(xs))

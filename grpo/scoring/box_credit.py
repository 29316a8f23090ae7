"""Credit of a video's cells: the loss counts more where text was read (train.box_credit).

The reward is read from a few letters, and the advantage of a video is credit for all of its latents.
ViPO (visual preference policy optimisation) multiplies a video's advantage by a map over it, with a
mean of 1, from the features of a second network. Here the map follows from the boxes in which the
OCR engine read text, so no further network runs. Boxes count whatever was read in them: wrong
letters are where the model has to change.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from rewards.base import Box

DILATION = 1  # cells by which boxes are grown on each side
Boxes = Mapping[int, Sequence[Box]]  # {judged frame: boxes of its text}


def inside_boxes(boxes: Boxes, frames: int, shape: tuple[int, int, int]) -> np.ndarray:
    """Return which cells of a video's latents text was read in, bool [F, H, W].

    A frame that was not judged has the boxes of the nearest judged one, the earlier of two. A cell is
    inside if, grown by `DILATION` cells, a box of one of the cell's frames touches it. The first
    latent frame stands for one frame, each other one for (frames - 1) / (F - 1).

    boxes: of the video. frames: its number of frames. shape: (F, H, W) of its latents.
    """
    depth, height, width = shape
    inside = np.zeros(shape, bool)
    if not any(boxes.values()):
        return inside
    judged, every = np.array(sorted(boxes)), np.arange(frames)
    nearest = judged[np.abs(judged[:, None] - every).argmin(axis=0)]
    cells = -(-every // max((frames - 1) // max(depth - 1, 1), 1))
    for cell, frame in sorted(set(zip(cells.tolist(), nearest.tolist()))):
        for left, top, right, bottom in boxes[frame]:
            rows, columns = (
                slice(max(int(low * size) - DILATION, 0), int(np.ceil(high * size)) + DILATION)
                for low, high, size in ((top, bottom, height), (left, right, width))
            )
            inside[cell, rows, columns] = True
    return inside


def cell_weights(
    boxes: Sequence[Boxes], frames: int, shape: tuple[int, int, int], strength: float
) -> np.ndarray:
    """Return the weights of the cells of N videos, float32 [N, F, H, W], with a mean of 1 a video:

        M = 1 - strength + strength b / mean(b),    b = 1 inside the boxes (`inside_boxes`), else 0

    So a cell outside has 1 - strength, and one inside 1 + strength (1 / mean(b) - 1). A video
    without boxes has M = 1: zeros would remove it from the loss.

    boxes, frames, shape: as in `inside_boxes`, of each video. strength: in [0, 1).
    """
    inside = np.stack([inside_boxes(found, frames, shape) for found in boxes])
    share = inside.mean(axis=(1, 2, 3), keepdims=True)
    weights = 1 - strength + strength * inside / np.where(share > 0, share, 1.0)
    return np.where(share > 0, weights, 1.0).astype(np.float32)

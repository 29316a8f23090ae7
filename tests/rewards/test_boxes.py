"""Rectangles around text, and the area that they cover."""

import dataclasses

import numpy as np
import pytest

from rewards.base import Score
from rewards.boxes import around, union_area
from rewards.composite import CompositeReward, text_area
from rewards.ocr.rules import OCRReward
from rewards.pool import RewardPool
from rewards.pool_set import BUILT_IN_POOL, PoolSet
from tests.rewards.drawing import filled, video
from tests.rewards.pool_rewards import Boxed


def test_the_rectangle_around_a_tilted_box_ends_at_the_frame():
    corners = (-5.0, 10.0), (30.0, 2.0), (40.0, 50.0), (10.0, 64.5)
    assert around(corners, height=64, width=80) == (0, 2 / 64, 0.5, 1)


def test_the_area_of_a_union_equals_a_count_of_pixels():
    """Rectangles with sides on a grid, which overlap, touch, are equal and are empty."""
    rng = np.random.default_rng(0)
    for count in (0, 1, 2, 7):
        corners = rng.integers(0, 33, (count, 2, 2))
        low, high = corners.min(axis=1), corners.max(axis=1)
        pixels = np.zeros((32, 32), bool)
        for (left, top), (right, bottom) in zip(low, high):
            pixels[top:bottom, left:right] = True
        boxes = [tuple(map(float, box)) for box in np.concatenate([low, high], axis=1) / 32]
        assert union_area(boxes) == pytest.approx(pixels.mean())
    assert union_area([(0.5, 0.5, 0.5, 0.5)]) == 0


def test_text_area_is_a_mean_over_judged_frames():
    half, quarter = (0.0, 0.0, 1.0, 0.5), (0.0, 0.0, 0.5, 0.5)
    score = Score(1.0, frames=(0, 4, 8), boxes=((half, quarter), (), (quarter,)))
    assert text_area(score) == pytest.approx(0.75 / 3)
    for lacking in (Score(1.0, frames=(0,)), Score(1.0)):
        with pytest.raises(RuntimeError, match="boxes"):
            text_area(lacking)


def test_the_reader_keeps_boxes_where_it_is_asked_to():
    """Letters of 24 pixels in the middle of 64 x 128 pixels; nothing on the blank frame."""
    frames = np.concatenate([video("OPEN", frames=1), np.full((1, 64, 128, 3), 235, np.uint8)])
    reader = OCRReward()
    plain = reader.score(frames, ("OPEN",))
    reader.boxes = True
    score = reader.score(frames, ("OPEN",))
    assert plain.boxes == () and dataclasses.replace(score, boxes=()) == plain
    (((left, top, right, bottom),), nothing) = score.boxes
    assert nothing == ()
    assert 0.1 < left < 0.35 < 0.65 < right < 0.9 and 0.15 < top < 0.45 < 0.55 < bottom < 0.85


@pytest.mark.parametrize("workers", [0, 1])
def test_boxes_come_through_the_pool_by_frame(workers):
    """Also from a worker process, and with a failure in another pool; not of a masked video."""
    with RewardPool(Boxed, workers) as pool:
        found = pool.submit(filled(255, 0), ["a", "b"]).result()
    assert found.boxes == [{0: ((0.0, 0.0, 0.75, 0.5),)}, {0: ((0.0, 0.0, 0.25, 0.5),)}]


def test_boxes_and_their_area_come_from_the_reader_of_a_composite():
    factories = {"ocr": Boxed, "text_area": None}
    pools = {BUILT_IN_POOL: RewardPool(lambda: CompositeReward(factories))}
    with PoolSet(pools, "ocr", BUILT_IN_POOL) as pool:
        found = pool.submit(filled(255), ["a"]).result()
    assert found.boxes == [{0: ((0.0, 0.0, 0.75, 0.5),)}]
    np.testing.assert_allclose(found.parts["text_area"], [0.375])

"""Ranges of numbers: what is in them, and what a message asks for."""

import math

import pytest

from wan_jax.command_line.limits import SEED, STEPS, Range
from wan_jax.diffusion.schedule import TRAIN_TIMESTEPS


@pytest.mark.parametrize(
    "limits, inside, outside",
    [
        (Range(0), [0, 1e9], [-1e-9, math.inf, math.nan]),
        (Range(0, above=True), [1e-9], [0]),
        (Range(0, 1), [0, 1], [1.1, math.nan]),
        (Range(0, 1, below=True), [0, 0.9], [1]),
        (Range(0, below=False), [math.inf], [math.nan]),
        (SEED, [0, 2**32 - 1], [-1, 2**32]),
    ],
)
def test_membership(limits, inside, outside):
    assert all(value in limits for value in inside)
    assert not any(value in limits for value in outside)


def test_a_schedule_has_no_more_steps_than_the_training():
    assert STEPS.high == TRAIN_TIMESTEPS


@pytest.mark.parametrize(
    "limits, value, words",
    [
        (Range(2), 1, ["at least 2"]),
        (Range(2, above=True), 2, ["above 2"]),
        (Range(0, 1), 2, ["at least 0", "at most 1"]),
        (Range(0, 1, below=True), 1, ["below 1"]),
        (Range(0), math.inf, ["finite"]),
        (Range(0, note="use 3"), -1, ["use 3"]),
    ],
)
def test_what_is_required(limits, value, words):
    assert all(word in limits.requirement(value) for word in words)

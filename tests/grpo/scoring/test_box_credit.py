"""Weights of the cells of latents from the boxes of the text that was read."""

import numpy as np
import pytest

from grpo.scoring.box_credit import cell_weights
from grpo.settings import parse
from tests import reference
from tests.grpo import tiny_run
from wan_jax.errors import UserError

RECTANGLE, OTHER = (0.3, 0.4, 0.55, 0.6), (0.8, 0.0, 1.0, 0.11)


@pytest.mark.parametrize(
    "frames, shape, boxes",
    [
        (1, (1, 8, 16), {0: (RECTANGLE,)}),
        (1, (1, 5, 7), {0: (RECTANGLE, OTHER)}),
        (9, (3, 6, 6), {0: (), 4: (RECTANGLE,), 8: (OTHER,)}),
        (9, (3, 6, 6), {0: (OTHER,), 8: ()}),  # frame 4 is between them: it has those of frame 0
        (33, (9, 8, 8), {0: (), 11: (RECTANGLE,), 21: (), 32: (RECTANGLE, OTHER)}),
    ],
)
@pytest.mark.parametrize("strength", [0.3, 0.9])
def test_weights_equal_their_formula(frames, shape, boxes, strength):
    """More than 1 in and beside the boxes, 1 - strength elsewhere, 1 in the mean of each video."""
    found = cell_weights([boxes, {}], frames, shape, strength)
    assert found.shape == (2, *shape) and found.dtype == np.float32
    np.testing.assert_allclose(
        found[0], reference.cell_weights(boxes, frames, shape, strength), rtol=1e-6
    )
    np.testing.assert_allclose(found.mean(axis=(1, 2, 3)), 1, rtol=1e-6)
    assert found[0].min() == np.float32(1 - strength) and found[0].max() > 1


@pytest.mark.parametrize("boxes", [{}, {0: (), 4: ()}, {0: ((0, 0, 1, 1),), 4: ((0, 0, 1, 1),)}])
def test_without_boxes_or_with_boxes_everywhere_all_cells_count_alike(boxes):
    np.testing.assert_array_equal(cell_weights([boxes], 5, (2, 4, 4), 0.5), 1)


def test_the_first_latent_frame_stands_for_one_frame():
    (found,) = cell_weights([{0: (), 1: ((0.0, 0.0, 0.1, 0.1),)}], 5, (2, 4, 4), 0.5)
    assert (found[0] == 0.5).all() and found[1, 0, 0] > 1


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"train.box_credit": 0.0}, "train.box_credit=0.0"),
        ({"train.kl_weight": 0.0}, "train.kl_weight=0.0"),
        ({"train.kl_as": "reward", "train.kl_weight": 0.1}, "train.kl_as=reward"),
        ({"train.method": "dpo", "train.timesteps": 2}, "train.method=dpo"),
    ],
)
def test_a_kl_outside_of_the_boxes_without_boxes_or_a_kl_is_refused(changes, named):
    text = tiny_run.recipe_text("model", "folder")
    values = {"train.box_kl": True, "train.box_credit": 0.5}
    config = tiny_run.config_of(text, **values | changes)
    with pytest.raises(UserError) as error:
        parse.recipe_from_config(config)
    assert "train.box_kl=True" in str(error.value) and named in str(error.value)

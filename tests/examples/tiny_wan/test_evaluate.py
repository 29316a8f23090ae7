"""Evaluation of tiny-wan: pixels, sheets, and samples that OCR reads."""

import pathlib
import types

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from examples.tiny_wan import evaluate

TINY_WAN = pathlib.Path(__file__).parents[3] / "assets/tiny-wan"


def test_pixels():
    assert evaluate.to_uint8(jnp.array([-2.0, -1.0, 0.0, 1.0, 2.0])).tolist() == [
        0,
        0,
        128,
        255,
        255,
    ]


def test_contact_sheet(tmp_path):
    frames = np.stack([np.full((4, 6, 3), value, np.uint8) for value in (10, 20, 30)])
    evaluate.contact_sheet(tmp_path / "sheet.png", frames, columns=2)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (2 * 6, 2 * 8, 3)
    assert (sheet[0, 0, 0], sheet[0, 8, 0], sheet[6, 0, 0], sheet[6, 8, 0]) == (10, 20, 30, 0)


class Pool:
    """Takes the place of the OCR workers; remembers what it was given."""

    def submit(self, videos, targets):
        self.videos, self.targets = videos, targets
        values = np.linspace(0, 1, len(videos))
        return types.SimpleNamespace(result=lambda: types.SimpleNamespace(values=values))


@pytest.mark.slow
def test_model_is_sampled_in_groups_of_one_prompt(capsys):
    pool = Pool()
    rewards, videos = evaluate.check_model(TINY_WAN, pool, groups=2, size=2, steps=1)
    assert rewards.shape == (2, 2) and videos is pool.videos
    assert videos.shape == (4, 1, 64, 128, 3) and videos.dtype == np.uint8
    first, second, third, fourth = pool.targets
    assert first == second != third == fourth and len(first) == 1
    assert "reward 0.500" in capsys.readouterr().out


@pytest.mark.slow
def test_models_are_judged_at_every_size_on_one_set_of_prompts(capsys):
    pool, targets = Pool(), []
    submit = pool.submit
    pool.submit = lambda videos, texts: (
        targets.append((videos.shape[2:4], texts)) or submit(videos, texts)
    )
    frame_sizes = ((32, 64), (64, 128))
    found = evaluate.judge_sizes(
        [TINY_WAN, f"{TINY_WAN}/"], frame_sizes, pool, count=8, checks=(dict(steps=1),)
    )
    assert [key[1:] for key in found] == [(size, 0) for size in frame_sizes for _ in range(2)]
    assert all(rewards.shape == (1, 8) for rewards in found.values())
    sampled = [texts for _, texts in targets if len(set(texts)) == 1]
    assert len(sampled) == 4 and all(texts == sampled[0] for texts in sampled)
    assert [size for size, _ in targets] == [frame_sizes[0]] * 4 + [frame_sizes[1]] * 4
    assert capsys.readouterr().out.count(": 0.500 +- 0.000") == 4

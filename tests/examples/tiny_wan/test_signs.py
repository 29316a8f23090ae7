"""The tiny Wan's signs: they show what the prompts say, and clean ones can be read."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rapidfuzz.distance import Levenshtein

from examples.tiny_wan import prompts, signs
from examples.tiny_wan.signs import MODES, NoiseMix
from rewards.ocr.targets import parse_targets

ATLAS, BATCH = signs.build_atlas(), 2048
sample = jax.jit(signs.sample, static_argnames=("batch", "frames", "heldout", "words", "size"))
render = jax.jit(signs.render, static_argnames=("frames", "dtype", "size"))
LARGE = 96, 192


def only(mode: str) -> NoiseMix:
    return NoiseMix(**{name: float(name == mode) for name in MODES[1:]})


def first(n: int, tree):
    return jax.tree.map(lambda x: x[:n], tree)


@pytest.fixture(scope="module")
def score():
    """Mean reward of pictures [B, 64, 128, 3]: 1 - edit distance / length, at least 0, without
    spaces.
    """
    from rapidocr import RapidOCR

    engine = RapidOCR(
        params={
            "Global.use_cls": False,
            "Global.log_level": "critical",
            "EngineConfig.onnxruntime.intra_op_num_threads": 1,
            "Det.limit_type": "min",
            "Det.limit_side_len": 64,
            "Rec.rec_img_shape": [3, 48, 160],
        }
    )

    def mean_reward(pictures, targets):
        rewards = []
        for picture, target in zip(
            np.asarray((pictures + 1) * 127.5 + 0.5).astype(np.uint8), targets
        ):
            texts = engine(np.ascontiguousarray(picture[..., ::-1])).txts or ()  # OCR takes BGR
            read, target = "".join(texts).replace(" ", "").lower(), target.replace(" ", "")
            rewards.append(max(0.0, 1 - Levenshtein.distance(read, target) / len(target)))
        return np.mean(rewards)

    return mean_reward


def test_shapes_and_range():
    _, params = sample(jax.random.key(0), ATLAS, batch=BATCH, frames=9, noise=NoiseMix())
    params = first(5, params)
    assert params.letters.shape == params.target.shape == (5, 2, 6)
    video = render(ATLAS, params, frames=9, dtype=jnp.bfloat16)
    assert video.shape == (5, 9, 64, 128, 3) and video.dtype == jnp.bfloat16
    assert float(jnp.abs(video).max()) <= 1 and float(video.std()) > 0.2


@pytest.mark.slow
def test_same_key_same_data():
    one, two = (sample(jax.random.key(3), ATLAS, batch=BATCH, noise=NoiseMix()) for _ in range(2))
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, one, two)))
    other, _ = sample(jax.random.key(4), ATLAS, batch=BATCH, noise=NoiseMix())
    assert not np.array_equal(one[0].letters, other.letters)


@pytest.mark.parametrize("frames", [1, 9])
def test_prompt_quotes_the_letters_drawn(frames):
    content, params = sample(
        jax.random.key(1), ATLAS, batch=BATCH, frames=frames, noise=only("clean")
    )
    sentences, words = prompts.sentences(content), prompts.words(params.letters)
    assert words == prompts.words(params.target)
    assert [parse_targets(sentence) for sentence in sentences] == [(word,) for word in words]
    assert 25 <= min(map(len, sentences)) and max(map(len, sentences)) <= 75
    assert 0.2 < np.mean([" " in word for word in words]) < 0.3


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("split", [False, True])
def test_words_are_of_one_split(split):
    _, params = sample(jax.random.key(5), ATLAS, batch=BATCH, heldout=split, noise=NoiseMix())
    words = [word for text in prompts.words(params.target) for word in text.split()]
    assert {prompts.is_heldout(word) for word in words} == {split}
    assert 0.2 < np.mean([word in prompts.WORDS for word in words]) < 0.5
    singles = [text for text in prompts.words(params.target) if " " not in text]
    assert {len(text) for text in singles} == {3, 4, 5, 6}


def test_frame_0_of_a_clip_is_the_picture_and_the_rest_moves():
    _, params = sample(jax.random.key(6), ATLAS, batch=BATCH, frames=9, noise=NoiseMix())
    params = first(5, params)
    clip, picture = render(ATLAS, params, frames=9), render(ATLAS, params)
    np.testing.assert_allclose(clip[:, 0], picture[:, 0], atol=1e-4)
    assert float(jnp.abs(clip[:, 1] - clip[:, 0]).max((1, 2, 3)).min()) > 0.1


def test_misspelt_signs_differ_in_letters_only():
    clean_content, clean = sample(jax.random.key(7), ATLAS, batch=BATCH, noise=only("clean"))
    content, wrong = sample(jax.random.key(7), ATLAS, batch=BATCH, noise=only("misspelt"))
    assert prompts.sentences(content) == prompts.sentences(clean_content)
    changed = {
        field.name
        for field in dataclasses.fields(clean)
        if not np.array_equal(getattr(clean, field.name), getattr(wrong, field.name))
    }
    assert changed == {"letters", "mode"}
    assert all(a != b for a, b in zip(prompts.words(clean.letters), prompts.words(wrong.letters)))
    lengths = np.asarray(wrong.letters) >= 0
    assert np.array_equal(lengths, np.sort(lengths, axis=-1)[..., ::-1])  # no gaps


def test_modes_come_in_the_shares_asked_for():
    _, params = sample(jax.random.key(8), ATLAS, batch=BATCH, noise=NoiseMix())
    shares = np.bincount(params.mode, minlength=len(MODES)) / BATCH
    expected = [getattr(NoiseMix(), name) for name in MODES[1:]]
    np.testing.assert_allclose(shares, [1 - sum(expected), *expected], atol=0.03)


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    "mode, low, high",
    [
        ("clean", 0.95, 1),
        ("misspelt", 0.5, 0.85),
        ("faint", 0, 0.3),
        ("blurred", 0, 0.3),
        ("tiny", 0, 0.4),
        ("covered", 0, 0.2),
        ("cut_off", 0, 0.35),
    ],
)
def test_how_well_each_mode_reads(score, mode, low, high):
    _, params = sample(jax.random.key(9), ATLAS, batch=BATCH, noise=only(mode))
    params = first(16, params)
    reward = score(render(ATLAS, params)[:, 0], prompts.words(params.target))
    assert low <= reward <= high


def test_larger_frames_show_the_same_texts_in_larger_letters(score):
    """Letters grow by a factor between 1 and that of the frame, and are read as well."""
    content, base = sample(jax.random.key(9), ATLAS, batch=BATCH)
    same, large = sample(jax.random.key(9), ATLAS, batch=BATCH, size=LARGE)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, content, same)))
    growth = np.asarray(large.em / base.em)
    assert 1 <= growth.min() < 1.05 and 1.45 < growth.max() <= 1.5 + 1e-6
    large = first(16, large)
    pictures = render(ATLAS, large, size=LARGE)[:, 0]
    assert pictures.shape == (16, *LARGE, 3)
    assert score(pictures, prompts.words(large.target)) >= 0.95


def test_tiny_letters_stay_tiny_in_larger_frames():
    _, params = sample(jax.random.key(9), ATLAS, batch=BATCH, noise=only("tiny"), size=LARGE)
    assert float(params.em.max()) < 6

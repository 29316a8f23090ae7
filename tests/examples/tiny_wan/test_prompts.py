"""The tiny Wan's prompts: words, splits, sentences, and the shipped files."""

import dataclasses
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.tiny_wan import prompts

ASSETS = pathlib.Path(__file__).parents[3] / "assets/prompts"


@pytest.mark.slow
@pytest.mark.parametrize("split, count", [("train", 2048), ("heldout", 256)])
def test_the_shipped_files_are_reproduced(tmp_path, split, count):
    out = tmp_path / "prompts.txt"
    options = dict(split=split, count=count, seed=1, out=out)
    command = [sys.executable, "-m", "examples.tiny_wan.prompts"]
    subprocess.run([*command, *(f"--{k}={v}" for k, v in options.items())], check=True)
    assert out.read_bytes() == (ASSETS / f"tiny_{split}.txt").read_bytes()


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("clip", [False, True])
def test_every_sentence_names_what_is_drawn(clip):
    templates = prompts.TEMPLATES + prompts.MOTION_TEMPLATES
    n = len(templates)
    draw = jax.jit(lambda key: prompts.draw_content(key, n, clip=clip))
    content = dataclasses.replace(draw(jax.random.key(2)), template=jnp.arange(n))
    fields = {name: np.asarray(value) for name, value in vars(content).items()}
    for i, sentence in enumerate(prompts.sentences(content)):
        assert f'"{prompts.words(content.letters)[i]}"' in sentence
        for name in ("sign", "letter", "ground"):
            named = prompts.COLOUR_NAMES[fields[name][i]] in sentence
            assert named or f"{{{name}}}" not in templates[i]
        moves = prompts.MOTIONS[fields["motion"][i]] in sentence
        assert moves == (templates[i] in prompts.MOTION_TEMPLATES)


@pytest.mark.slow
def test_half_of_the_clips_describe_their_motion():
    for clip, share in ((False, 0.0), (True, 0.5)):
        content = jax.jit(lambda key, clip=clip: prompts.draw_content(key, 2048, clip=clip))(
            jax.random.key(0)
        )
        moving = np.asarray(content.template) >= len(prompts.TEMPLATES)
        assert moving.mean() == pytest.approx(share, abs=0.05)


def test_colours_contrast():
    triples = prompts._colour_triples()
    assert (triples[:, 0] != triples[:, 1]).all() and (triples[:, 0] != triples[:, 2]).all()
    assert set(triples[:, 0].tolist()) == set(range(len(prompts.COLOURS)))


def test_hash_in_jit_is_crc32():
    words = prompts.WORDS
    found = prompts.heldout(jnp.stack([prompts.encode_word(word) for word in words]))
    assert found.tolist() == [prompts.is_heldout(word) for word in words]
    assert 0.05 < np.mean(found) < 0.15


def test_ascii_codes():
    codes = prompts.ascii_codes(["ab", "c"], 3)
    assert codes.dtype == np.uint8 and codes.tolist() == [[97, 98, 0], [99, 0, 0]]
    with pytest.raises(ValueError, match=r"4 characters.*width=3"):
        prompts.ascii_codes(["a", "abcd"], 3)


def test_too_many_texts_are_an_error(monkeypatch):
    monkeypatch.setattr(prompts, "words", lambda letters: ["a", "b", "a"])
    monkeypatch.setattr(prompts, "sentences", lambda content: ['"a"', '"b"', '"a"'])
    assert prompts.unique_prompts(2, 0) == ['"a"', '"b"']
    with pytest.raises(ValueError, match=r"count=3\b.*\b2 different"):
        prompts.unique_prompts(3, 0)

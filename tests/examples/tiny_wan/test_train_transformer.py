"""Training of tiny-wan's transformer: prompts inside `jit`, and a run of a few steps."""

import pathlib
import subprocess

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from examples.tiny_wan import prompts, tokenizer
from examples.tiny_wan.tokenise import tokenise
from examples.tiny_wan.train_transformer import LETTERS, LONGEST, letter_classes
from tests import commands

TINY_WAN = pathlib.Path(__file__).parents[3] / "assets/tiny-wan"


def test_tokens_are_those_of_the_tokenizer():
    texts = ['A red sign with the word "open" in white letters.', 'Text: "ab cd". (100 %)', ""]
    ids, mask = jax.jit(tokenise)(prompts.ascii_codes(texts, LONGEST))
    assert ids.shape == mask.shape == (3, LONGEST + 2)
    for text, row, real in zip(texts, np.asarray(ids), np.asarray(mask)):
        expected = tokenizer.build().encode(text).ids
        assert row[: len(expected)].tolist() == expected and real.sum() == len(expected)
        assert not row[len(expected) :].any()


def test_letter_classes():
    (classes,) = letter_classes(prompts.ascii_codes(['A "ab cde" x'], 14)).tolist()
    # the tokenizer's space, then A, a space and the quote
    assert classes == [0, 0, 0, 0, 1, 2, 0, 1 + LETTERS, 2 + LETTERS, 3 + LETTERS, 0, 0, 0, 0, 0, 0]


@pytest.mark.slow
def test_a_run_of_a_few_steps(tmp_path):
    options = dict(
        vae=TINY_WAN / "vae", init=TINY_WAN, out=tmp_path, pool=4, pool_clips=2, batch=2, clips=1
    )
    options |= dict(inner=1, seconds=1e-9, final_rate=1, sizes="64x128,32x64")  # over at once
    arguments = [f"--{key}={value}" for key, value in options.items()]
    command = commands.command("examples.tiny_wan.train_transformer", *arguments)
    done = subprocess.run(command, env=commands.environment(), capture_output=True, text=True)
    assert done.returncode == 0 and "pool of 4 frames and 2 clips" in done.stdout, done.stderr
    assert "transformer: 0 steps" not in done.stdout and "loss nan" not in done.stdout
    for name, file in (
        ("transformer", "diffusion_pytorch_model.safetensors"),
        ("text_encoder", "model.safetensors"),
    ):
        shipped, made = load_file(TINY_WAN / name / file), load_file(tmp_path / name / file)
        assert {k: v.shape for k, v in made.items()} == {k: v.shape for k, v in shipped.items()}
        assert any((made[k] != shipped[k]).any() for k in made)

"""Prompts of the published models' recipes: the shipped files are what the code writes."""

import pathlib
import subprocess
import sys

from examples import ocr_prompts
from rewards.ocr.targets import parse_targets

ASSETS = pathlib.Path(__file__).parents[2] / "assets/prompts"


def test_the_shipped_files_are_reproduced(tmp_path):
    out, heldout = tmp_path / "train.txt", tmp_path / "heldout.txt"
    command = [sys.executable, "-m", "examples.ocr_prompts", "--out", out, "--heldout", heldout]
    subprocess.run(command, check=True)
    assert out.read_bytes() == (ASSETS / "ocr_train.txt").read_bytes()
    assert heldout.read_bytes() == (ASSETS / "ocr_heldout.txt").read_bytes()


def test_no_word_is_in_both_files():
    words = []
    for name in ("train", "heldout"):
        lines = (ASSETS / f"ocr_{name}.txt").read_text().splitlines()
        texts = [text for line in lines for text in parse_targets(line)]
        words.append({word for text in texts for word in text.lower().split()})
    train, heldout = ocr_prompts.split_words()
    assert words == [set(train), set(heldout)] and not words[0] & words[1]
    assert len(train) > 100 and len(heldout) > 20

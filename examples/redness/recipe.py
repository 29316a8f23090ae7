"""tiny-wan learns to draw red pictures, by a reward of the user's own, in five minutes on a laptop.

    python -m convert.from_diffusers --src assets/tiny-wan --dst models/tiny-wan --dtype float32
    python -m grpo.check_rewards --config=examples/redness/recipe.py
    python -m grpo.train --config=examples/redness/recipe.py

The reward is in redness.py next to this file. The prompts name no text, so nothing is read. With
prompts that do, the spelling can be logged without being trained:

    --config.prompts.train=assets/prompts/tiny_train.txt \\
    --config.prompts.heldout=assets/prompts/tiny_heldout.txt --config.reward.weights.ocr=0
"""

import pathlib

from configs import tiny_ocr

HERE = pathlib.Path(__file__).resolve().parent


def get_config():
    c = tiny_ocr.get_config()
    c.run_dir = "runs/redness"
    c.epochs = 15
    c.prompts.train = str(HERE / "train.txt")
    c.prompts.heldout = str(HERE / "heldout.txt")
    c.reward.own = {"red": "redness:Redness"}
    c.reward.weights.red = 1.0
    c.reward.weights.ocr = None  # the prompts have no text to read
    c.reward.panel = ("dark",)  # colours and edges are meant to change
    c.eval.every = 15
    return c

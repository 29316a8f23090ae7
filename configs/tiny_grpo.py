"""tiny-wan learns to spell by Flow-GRPO, on a laptop.

    python -m grpo.train --config=configs/tiny_grpo.py

As `configs/tiny_ocr.py`, but with 10 steps, 2 of which are stochastic and trained, and without KL.
Results: docs/results.md.
"""

from configs import tiny_ocr


def get_config():
    c = tiny_ocr.get_config()
    c.run_dir = "runs/tiny_grpo"
    c.sample.steps = 10
    c.sample.sde = "flow_sde"
    c.sample.noise_level = 0.7
    c.sample.sde_steps = 2
    c.sample.sde_range = (0, 6)
    c.train.method = "grpo"
    c.train.kl_weight = 0.0
    return c

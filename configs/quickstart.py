"""The shortest run of tiny-wan that shows a gain: `scripts/quickstart.sh`, five minutes on two slow cores.

    python -m grpo.train --config=configs/quickstart.py

As `configs/tiny_ocr.py`, but 10 epochs instead of 40, and two evaluations of 64 held-out prompts. The
full recipe goes further; `--config.epochs=40` on the same run folder continues this one.
"""

from configs import tiny_ocr


def get_config():
    c = tiny_ocr.get_config()
    c.run_dir = "runs/quickstart"
    c.epochs = 10
    c.eval.num_prompts = 64
    c.eval.every = 10
    return c

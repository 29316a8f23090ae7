"""tiny-wan learns to spell by DiffusionNFT, on a laptop.

    python -m convert.from_diffusers --src assets/tiny-wan --dst models/tiny-wan --dtype float32
    python -m grpo.train --config=configs/tiny_ocr.py

Pictures of 64x128 pixels, guidance 2, LoRA on attention. An epoch has 8 prompts with 8 pictures each,
sampled in 4 steps, which teach as much as 10 here (docs/howto/sizes.md), and trained at 4 noise
levels; held-out pictures have 10 steps. Results: docs/results.md. `configs/tiny_grpo.py` does the
same by Flow-GRPO.
"""

from configs.defaults import defaults


def get_config():
    c = defaults()
    c.run_dir = "runs/tiny_ocr"
    c.epochs = 40
    c.model.path = "models/tiny-wan"
    c.model.dtype = "float32"
    c.model.remat = "none"
    c.prompts.train = "assets/prompts/tiny_train.txt"
    c.prompts.heldout = "assets/prompts/tiny_heldout.txt"
    c.sample.height, c.sample.width = 64, 128
    c.sample.steps = 4
    c.sample.guidance = 2.0
    c.sample.groups = 8
    c.sample.group_size = 8
    c.sample.batch_size = 32
    c.train.updates_per_epoch = 1
    c.train.learning_rate = 5e-4
    c.eval.every = 20
    c.eval.steps = 10
    c.eval.guidance = 2.0
    c.eval.solver = "euler"
    c.save.every = 5
    return c

"""Flow-GRPO's `general_ocr_wan2_1`: Wan 2.1 T2V 1.3B, videos of 33 frames of 240x416.

    python -m convert.from_diffusers --src Wan-AI/Wan2.1-T2V-1.3B-Diffusers --dst models/wan2.1-1.3b --dtype bfloat16
    python -m grpo.train --config=configs/published/flow_grpo_wan21_1_3b.py

`configs/published/common.py` says how to get prompts and OCR engine, and what remains different.
Published: all settings but the number of GPUs, and no curve. Here they are those of one GPU, 2 batches
of 8 videos in groups of 4; for N GPUs `sample.groups` is 4 N and `sample.batch_size` 8 N. The authors
call groups of 8 or more steadier. Published are 100000 epochs, to be stopped by hand; here 1000.
"""

from configs.published.common import common


def get_config():
    c = common()
    c.run_dir = "runs/flow_grpo_wan21_1_3b"
    c.epochs = 1000
    c.model.path = "models/wan2.1-1.3b"
    c.sample.frames, c.sample.height, c.sample.width = 33, 240, 416
    c.sample.groups, c.sample.group_size, c.sample.batch_size = 4, 4, 8
    c.train.ema_decay = 0.9 ** (1 / 8)
    c.reward.workers = 8
    c.eval.every = 30
    c.save.every = 60
    return c

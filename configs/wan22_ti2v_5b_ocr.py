"""Wan 2.2 TI2V 5B learns to spell in single frames of 512x512, from text alone.

    python -m convert.from_diffusers --src Wan-AI/Wan2.2-TI2V-5B-Diffusers --dst
    models/wan2.2-ti2v-5b --dtype bfloat16 python -m grpo.train
    --config=configs/wan22_ti2v_5b_ocr.py

As `wan21_14b_ocr`, with this model's shift 5 and guidance 5. Published on 4 MI300X: 0.32 to about
0.68 on training prompts. Sizes are multiples of 32. Weights in bfloat16 are 10 GB. Not run here
with the published weights.
"""

from configs.wan21_14b_ocr import get_config as wan21_14b


def get_config():
    c = wan21_14b()
    c.run_dir = "runs/wan22_ti2v_5b_ocr"
    c.model.path = "models/wan2.2-ti2v-5b"
    c.sample.shift = 5.0
    c.sample.guidance = c.eval.guidance = 5.0
    return c

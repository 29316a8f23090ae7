"""Wan 2.2 TI2V 5B learns to spell in pictures of 512x512, from text alone, by Flow-GRPO.

    python -m convert.from_diffusers --src Wan-AI/Wan2.2-TI2V-5B-Diffusers --dst models/wan2.2-ti2v-5b --dtype bfloat16
    python -m grpo.train --config=configs/wan22_ti2v_5b_ocr.py

As `wan21_14b_ocr`, with Wan's own shift 5 and guidance 5. Heights and widths are multiples of 32. AMD's
run of this model has another reward, other prompts and, as far as published, guidance 4.5
(`configs/published/amd_wan22_ti2v_5b.py`). It has not been run here with the published weights, which
take 10 GB in bfloat16.
"""

from configs.wan21_14b_ocr import get_config as wan21_14b


def get_config():
    c = wan21_14b()
    c.run_dir = "runs/wan22_ti2v_5b_ocr"
    c.model.path = "models/wan2.2-ti2v-5b"
    c.sample.shift = 5.0
    c.sample.guidance = c.eval.guidance = 5.0
    return c

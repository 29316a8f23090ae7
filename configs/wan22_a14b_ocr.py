"""Wan 2.2 T2V A14B, two experts, learns to spell in pictures of 512x512, by Flow-GRPO.

    python -m convert.from_diffusers --src Wan-AI/Wan2.2-T2V-A14B-Diffusers --dst models/wan2.2-a14b --dtype bfloat16
    python -m grpo.train --config=configs/wan22_a14b_ocr.py

As `wan21_14b_ocr`, with guidance 4 for the first expert and 3 for the second, and with Wan's own
shift 12, at which the first expert has 13 of the 20 steps (7 at the shift 3 of the scheduler's file).
Every epoch trains both experts: the stochastic steps are divided in proportion. All of this is ours:
AMD's run had guidance 4.5, shift 3 and the first expert alone (`configs/published/amd_wan22_a14b.py`).
It has not been run here with the published weights.

Memory: an expert takes 28.6 GB in bfloat16. `model.offload` keeps the idle one in host memory where
both do not fit.
"""

from configs.wan21_14b_ocr import get_config as wan21_14b


def get_config():
    c = wan21_14b()
    c.run_dir = "runs/wan22_a14b_ocr"
    c.model.path = "models/wan2.2-a14b"
    c.sample.shift = 12.0
    c.sample.guidance, c.sample.guidance_2 = 4.0, 3.0
    c.eval.guidance, c.eval.guidance_2 = 4.0, 3.0
    return c

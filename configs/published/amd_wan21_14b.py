"""AMD's run of Flow-GRPO: Wan 2.1 T2V 14B, pictures of 512x512, on four MI300X.

    python -m convert.from_diffusers --src Wan-AI/Wan2.1-T2V-14B-Diffusers --dst models/wan2.1-14b --dtype bfloat16
    python -m grpo.train --config=configs/published/amd_wan21_14b.py

Source: github.com/ROCm/rocm-blogs, blogs/artificial-intelligence/wan-flow-grpo at 7552dae. Published:
the changes to `general_ocr_wan2_1` (size, batches, epochs), Diffusers 0.33.1, PaddleOCR 2.9.1, and the
OCR reward of the training videos, which rises from 0.55 to 0.79. Inferred: guidance, shift and
everything that is not among the changes. That curve has not been reproduced here.

`configs/published/common.py` says how to get prompts and OCR engine, and what remains different.
Here in addition: all 200 epochs train, where their script skips the first two.
"""

from configs.published.common import amd


def get_config():
    c = amd()
    c.run_dir = "runs/amd_wan21_14b"
    c.model.path = "models/wan2.1-14b"
    return c

"""Wan 2.1 T2V 14B learns to spell in pictures of 512x512, by Flow-GRPO.

    python -m convert.from_diffusers --src Wan-AI/Wan2.1-T2V-14B-Diffusers --dst models/wan2.1-14b --dtype bfloat16
    python -m grpo.train --config=configs/wan21_14b_ocr.py

Size, groups and optimiser are those of AMD's published run on 4 MI300X: 48 groups of 12 pictures, the
rest as Flow-GRPO's `general_ocr_wan2_1`. Reward, prompts, noise levels and evaluation are ours: the
rule `spelling`, to which other text in the picture costs at most half, RapidOCR, and made sentences. So
rewards cannot be compared with the published ones; `configs/published/amd_wan21_14b.py` is that run.
`--config.train.method=nft` is DiffusionNFT, which learnt faster on the small Wan and updates in a
fraction of the time.

Memory: a trained step of 9 pictures without guidance takes at most 35 GiB on one H200, with random
weights and model.remat=block (docs/results.md). Several GPUs share a batch, so sample.batch_size is a
multiple of their number. All weights (lora.rank=0) need 4 GPUs, over which mesh.fsdp splits them, or 2
with train.offload_optimiser=True, or with train.moments_dtype=bfloat16 train.ema_decay=0
train.kl_weight=0 and XLA_PYTHON_CLIENT_MEM_FRACTION=0.95.
"""

from configs.defaults import defaults


def get_config():
    c = defaults()
    c.run_dir = "runs/wan21_14b_ocr"
    c.model.path = "models/wan2.1-14b"
    c.prompts.train = "assets/prompts/ocr_train.txt"
    c.prompts.heldout = "assets/prompts/ocr_heldout.txt"
    c.sample.batch_size = 36  # 9 a device on 4
    c.train.method = "grpo"
    c.reward.workers = 16
    return c

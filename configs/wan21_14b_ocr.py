"""Wan 2.1 T2V 14B learns to spell in single frames: AMD's published run, 512x512x1 on 4 MI300X,
K=12, 48 groups.

    python -m convert.from_diffusers --src Wan-AI/Wan2.1-T2V-14B-Diffusers --dst models/wan2.1-14b
    --dtype bfloat16 python -m grpo.train --config=configs/wan21_14b_ocr.py

Published: 200 epochs take the OCR reward on training prompts from 0.55 to 0.79; the rest as
`general_ocr_wan2_1`. On one H200 a trained step of 9 pictures without guidance peaks at 35 GiB with
random weights (docs/results.md); several GPUs share the batch, so sample.batch_size is a multiple
of their number. All weights (lora.rank=0) take 4 GPUs or more to train, which share them
(mesh.fsdp). The curve has not been run here. `--config.train.method=nft` is DiffusionNFT, which
learnt faster on the small Wan and updates in a fraction of the time.
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

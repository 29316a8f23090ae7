"""Wan 2.1 T2V 1.3B learns to spell in videos of 33 frames of 240x416, by Flow-GRPO.

    python -m convert.from_diffusers --src Wan-AI/Wan2.1-T2V-1.3B-Diffusers --dst models/wan2.1-1.3b --dtype bfloat16
    python -m grpo.train --config=configs/wan21_1_3b_ocr.py

Size, guidance 4.5, shift 3, LoRA of rank 32 on attention, clip range 1e-3, KL weight 0.004 and
advantages by the standard deviation of the group are those of Flow-GRPO's `general_ocr_wan2_1`. Groups
have 8 videos instead of 4, since the authors call 8 or more steadier. Reward, prompts, noise levels
and evaluation are ours; `configs/published/flow_grpo_wan21_1_3b.py` is the published run. None has
been run here with the published weights. `--config.train.method=nft` is DiffusionNFT, which learnt
faster on the small Wan and updates in a fraction of the time.

Memory: one GPU. A trained step of 9 such videos without guidance takes at most 9 GiB on one H200
with model.remat=block (docs/results_archive.md).
"""

from configs.defaults import defaults


def get_config():
    c = defaults()
    c.run_dir = "runs/wan21_1_3b_ocr"
    c.model.path = "models/wan2.1-1.3b"
    c.prompts.train = "assets/prompts/ocr_train.txt"
    c.prompts.heldout = "assets/prompts/ocr_heldout.txt"
    c.sample.frames, c.sample.height, c.sample.width = 33, 240, 416
    c.sample.groups, c.sample.group_size, c.sample.batch_size = 16, 8, 8
    c.train.method = "grpo"
    c.reward.workers = 8
    c.eval.num_prompts = 64
    c.eval.every = 30
    c.eval.steps = 50
    return c

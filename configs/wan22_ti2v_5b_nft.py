"""Wan 2.2 TI2V 5B learns to spell in clips of 5 frames of 512x512 by DiffusionNFT.

    python -m convert.from_diffusers --src Wan-AI/Wan2.2-TI2V-5B-Diffusers --dst models/wan2.2-ti2v-5b --dtype bfloat16
    python -m grpo.train --config=configs/wan22_ti2v_5b_nft.py

Sampling, method and optimiser are those of RLinf's `wan22_ti2v_5b_nft_video_ocr` at 69af711: 10 steps
without guidance, 144 groups of 8 in two updates an epoch (192 videos at a time, six times), one noise
level a video, LoRA 32/64, learning rate 4e-4, beta 0.1, no KL, and a behaviour policy that
follows the trained one at once in the first epoch and by a hundredth in the 70th. RLinf publishes no
result. It also bounds the change of a velocity to a tenth of its norm (`nft_clip_ratio`). This
project has no such bound in the loss; `train.max_velocity_distance` ends a run instead. Reward, prompts and shift 5 are
ours. It has not been run here with the published weights. Other projects report runs of NFT at this
size that fall after their peak: `configs/wan22_ti2v_5b_nft_careful.py` is a more careful variant.
"""

from configs.defaults import defaults


def get_config():
    c = defaults()
    c.run_dir = "runs/wan22_ti2v_5b_nft"
    c.epochs = 70
    c.model.path = "models/wan2.2-ti2v-5b"
    c.lora.rank, c.lora.alpha = 32, 64.0
    c.prompts.train = "assets/prompts/ocr_train.txt"
    c.prompts.heldout = "assets/prompts/ocr_heldout.txt"
    c.sample.frames, c.sample.height, c.sample.width = 5, 512, 512
    c.sample.steps, c.sample.shift = 10, 5.0
    c.sample.guidance = c.eval.guidance = 1.0
    c.sample.groups, c.sample.group_size, c.sample.batch_size = 144, 8, 32
    c.train.method = "nft"
    c.train.timesteps = 1
    c.train.nft_beta = 0.1
    c.train.kl_weight = 0.0
    c.train.learning_rate = 4e-4
    c.train.updates_per_epoch = 2
    # the behaviour policy keeps 0 of itself at first, 0.99 after 70 epochs
    c.train.old_rate, c.train.old_most = 0.99 / 140, 0.99
    c.reward.workers = 8
    c.eval.num_prompts = 128
    c.eval.every = 10
    c.eval.steps = 20
    return c

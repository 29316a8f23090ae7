"""Wan 2.2 TI2V 5B by DiffusionNFT, kept close to its start: a quarter of the learning rate, a KL on the
videos whose reward looks too good, and its own earlier samples as an anchor.

    python -m grpo.encode_clips --model models/wan2.2-ti2v-5b --from_model 512 --prompts assets/prompts/ocr_train.txt \\
        --out data/wan22_ti2v_5b_own --frames 5 --height 512 --width 512
    python -m grpo.train --config=configs/wan22_ti2v_5b_nft_careful.py

Otherwise as `wan22_ti2v_5b_nft`. The samples are made once, before training, with the model's own
guidance, which the anchor teaches the policy that samples without. On the small Wan, whose
evaluations have guidance as well, such an anchor cost reward, and clean pictures cost less: if you
have clips of your own, encode those instead (docs/results.md, "Methods at three times the budget").
The KL of weight 0.04 counts on the tenth of an epoch's videos whose main reward ranks furthest above
the measures of `reward.panel`. An alarm of the guard ends the run. The choices are ours and have not
been measured at this size: look at `kl_share` and `data_share` in the first epochs, and change the
weights where they are near 0 or 1.
"""

from configs.wan22_ti2v_5b_nft import get_config as plain


def get_config():
    c = plain()
    c.run_dir = "runs/wan22_ti2v_5b_nft_careful"
    c.train.learning_rate = 1e-4
    c.train.kl_weight, c.train.kl_gate = 0.04, 0.1
    c.train.on_alarm = "stop"
    c.data.path, c.data.weight = "data/wan22_ti2v_5b_own", 1.0
    return c

"""What all published runs of Flow-GRPO on Wan have in common: `general_ocr_wan2_1` of Flow-GRPO.

Sources: github.com/yifan123/flow_grpo, config/grpo.py at 31c71b9, config/base.py, and
scripts/train_wan2_1.py at 74db691, whose objective is `train.credit=none`; the revision 32b48fd is
`--config.train.credit=noise_over_step`. The prompts are files of that repository, and the OCR engine
is an extra:

    git clone https://github.com/yifan123/flow_grpo
    pip install paddleocr==2.9.1 paddlepaddle==3.3.1

Settings of them that are the defaults here: 20 steps of which the first 19 are trained, guidance 4.5,
shift 3, LoRA of rank 32 and alpha 64 on attention, learning rate 1e-4, clip range 1e-3, KL weight
0.004, weight decay 1e-4, gradients clipped at 1, advantages by the group's standard deviation and
clipped at 5, two updates an epoch.

What remains different, in all recipes of this folder:

- Random numbers: noise, prompts of an epoch, initial adapters. A prompt occurs once in an epoch; there
  each batch draws anew, so it may recur.
- The two updates have whole groups each. There, videos are shuffled over both.
- `train.zero_advantages=drop` masks all videos with advantage 0, and the mean is over the others.
  There, each GPU takes the mean over its own, adds a few of them again so that batches are equal, and
  trains on all of its videos with advantage 1e-6 where it has no others. An update without any other
  video is left out here. Rewards that are equal there may leave rounding errors instead of 0.
- The average moves after every update. There it moves after every eighth, as often as that update has
  micro-batches: by a tenth once (1.3B; here the decay is the eighth root of 0.9) or 8 times (AMD).
- Weights are bfloat16; there they are float32 and products bfloat16. Adapters, norms, log-probs and
  the optimiser are float32 in both.
- Prompts are cleaned as Wan's own code does (32 of 1018 test prompts differ, by apostrophes). Lines
  that cannot be scored and training prompts that are test prompts are left out, and counted.
- The OCR engine gets frames as its package expects them (BGR; there RGB), and its lines are joined
  row by row (there in the detector's order).
- Evaluations always start from the same noise, also before the first and after the last epoch.
"""

from configs.defaults import defaults

FLOW_GRPO = "flow_grpo"  # a clone of the repository


def common():
    """Return the settings of `general_ocr_wan2_1` that do not depend on model and GPUs."""
    c = defaults()
    c.seed = 42
    c.prompts.train = f"{FLOW_GRPO}/dataset/ocr/train.txt"
    c.prompts.heldout = f"{FLOW_GRPO}/dataset/ocr/test.txt"
    c.prompts.skip_invalid = True
    c.sample.schedule = "legacy"
    c.sample.untrained_noise = True
    c.train.method = "grpo"
    c.train.zero_advantages = "drop"
    c.reward.rule = "flow_grpo_video"
    c.reward.engine = "paddleocr"
    c.eval.num_prompts = 1018
    c.eval.solver = "euler"
    c.eval.steps = 50
    c.save.keep = 5
    return c


def amd():
    """Return the settings of AMD's run on four GPUs: pictures of 512x512, 48 groups of 12."""
    c = common()
    c.epochs = 200
    c.sample.batch_size = 36  # 9 a device on 4
    c.reward.workers = 16
    return c

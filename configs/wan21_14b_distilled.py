"""Wan 2.1 T2V 14B in 4 steps learns to spell in pictures of 512x512, by Flow-GRPO on a distilled base.

    python -m convert.from_diffusers --src Wan-AI/Wan2.1-T2V-14B-Diffusers --dst models/wan2.1-14b --dtype bfloat16
    python -m grpo.train --config=configs/wan21_14b_distilled.py

The distilled LoRA is merged into the base when the model is loaded (docs/howto/lora.md), and a LoRA is
trained on top, which is exported apart. The file is lightx2v's, of the hub repository
Kijai/WanVideo_comfy, with its settings: 4 steps of Euler, shift 5, no guidance. An epoch costs a tenth of
the forward passes of 20 steps with guidance.

The first three steps are stochastic and trained, with the noise of CPS: it keeps the amount of noise in
the latents that the schedule states, where the other forms add what 4 steps cannot remove. A distilled
model is only sound at its own few noise levels and is a poor velocity elsewhere, so the objective is the
likelihood of the steps that it takes. DiffusionNFT regresses the velocity of noised videos, which
others report to undo a distillation: there, distil the rollout and train the undistilled model.
This recipe has not been run with the published weights.
"""

from configs.wan21_14b_ocr import get_config as wan21_14b


def get_config():
    c = wan21_14b()
    c.run_dir = "runs/wan21_14b_distilled"
    c.model.loras = ("models/Wan21_T2V_14B_lightx2v_cfg_step_distill_lora_rank32.safetensors",)
    c.sample.steps = c.eval.steps = 4
    c.sample.shift = 5.0
    c.sample.guidance = c.eval.guidance = 1.0
    c.sample.sde = "cps"
    c.sample.sde_steps = 3
    c.sample.sde_range = (0, 3)
    c.train.objective = "unscaled"  # as published with CPS
    c.eval.solver = "euler"
    return c

"""AMD's run of Flow-GRPO on Wan 2.2 T2V A14B as it should be: both experts, with Wan's own settings.

    python -m convert.from_diffusers --src Wan-AI/Wan2.2-T2V-A14B-Diffusers --dst models/wan2.2-a14b --dtype bfloat16
    python -m grpo.train --config=configs/published/amd_wan22_a14b_both_experts.py

As `amd_wan22_a14b`, but both experts compute their own steps and are trained, with Wan's own shift 12
and guidance 4 for the first expert and 3 for the second. The first one has 13 of the 20 steps. This is
ours: nothing of it is published. Prompts, reward, list of noise levels, noise and evaluation are those
of the published run, so that the two can be compared.
"""

from configs.published.common import amd


def get_config():
    c = amd()
    c.run_dir = "runs/amd_wan22_a14b_both_experts"
    c.model.path = "models/wan2.2-a14b"
    c.sample.shift = 12.0
    c.sample.guidance, c.sample.guidance_2 = 4.0, 3.0
    c.eval.guidance, c.eval.guidance_2 = 4.0, 3.0
    return c

"""AMD's run of Flow-GRPO on Wan 2.2 T2V A14B as it was run: the first expert alone.

    python -m convert.from_diffusers --src Wan-AI/Wan2.2-T2V-A14B-Diffusers --dst models/wan2.2-a14b --dtype bfloat16
    python -m grpo.train --config=configs/published/amd_wan22_a14b.py

As `amd_wan21_14b`, with its deviations. Diffusers 0.33.1, which the run pins, does not know
`transformer_2`, so `transformer`, the expert for high noise, computed all steps in sampling, training
and evaluation. That is inferred from Diffusers' code, and so are shift 3, of the scheduler's file, and
guidance 4.5. Published: settings, and that the reward improves less than that of 2.1 14B.
`amd_wan22_a14b_both_experts` is the run with both.

Other commands take the checkpoint for one of a model with two experts. Evaluate it with this recipe.
"""

from configs.published.common import amd


def get_config():
    c = amd()
    c.run_dir = "runs/amd_wan22_a14b"
    c.model.path = "models/wan2.2-a14b"
    c.model.single_expert = True
    return c

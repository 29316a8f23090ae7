"""AMD's run of Flow-GRPO: Wan 2.2 TI2V 5B, pictures of 512x512, from text alone.

    python -m convert.from_diffusers --src Wan-AI/Wan2.2-TI2V-5B-Diffusers --dst models/wan2.2-ti2v-5b --dtype bfloat16
    python -m grpo.train --config=configs/published/amd_wan22_ti2v_5b.py

As `amd_wan21_14b`, with its deviations. Published: that the reward of the training videos rises from
0.32 to about 0.68, and no settings: those that are published are of the two 14B models. Inferred: that
this run has them too, and the shift 5 of the scheduler's file. Diffusers 0.33.1 cannot read this
model's VAE, so the run used another version, which is not published: with Diffusers 0.37 or later
`--config.sample.schedule=diffusers` is its list.
"""

from configs.published.common import amd


def get_config():
    c = amd()
    c.run_dir = "runs/amd_wan22_ti2v_5b"
    c.model.path = "models/wan2.2-ti2v-5b"
    c.sample.shift = 5.0
    return c

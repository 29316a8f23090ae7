"""The commands as console scripts: `wan-train ...` is `python -m grpo.train ...`."""

import runpy
import sys

COMMANDS = {
    "wan-train": "grpo.train",
    "wan-evaluate": "grpo.evaluate",
    "wan-compare": "grpo.compare",
    "wan-plan": "grpo.plan",
    "wan-check-rewards": "grpo.check_rewards",
    "wan-make-prompts": "grpo.make_prompts",
    "wan-encode-clips": "grpo.encode_clips",
    "wan-reward-head": "grpo.reward_head",
    "wan-report": "grpo.report",
    "wan-settings": "grpo.settings",
    "wan-sample": "wan_jax.sample",
    "wan-best-of": "grpo.best_of",
    "wan-convert": "convert.from_diffusers",
    "wan-to-diffusers": "convert.to_diffusers",
    "wan-export-lora": "convert.export_lora",
    "wan-reward-server": "rewards.server",
}


def main() -> None:
    """Run the module of the script that was called."""
    name = sys.argv[0].replace("\\", "/").rpartition("/")[2].removesuffix(".exe")
    from wan_jax.command_line import early  # which imports COMMANDS

    early.answer(COMMANDS[name], sys.argv[1:])
    runpy.run_module(COMMANDS[name], run_name="__main__", alter_sys=True)

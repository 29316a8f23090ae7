"""What `grpo.train` is told is checked before any work: each refusal names the setting, its value
and what to do.
"""

import functools
import re

import pytest

from grpo.settings import parse
from tests.grpo.test_train import RECIPE
from wan_jax.command_line.cli import UserError


@pytest.fixture
def c():
    namespace = {}
    exec(
        RECIPE.format(run="run", model="model", train="train.txt", heldout="heldout.txt"), namespace
    )
    return namespace["get_config"]()


BAD = [
    ("run_dir=", "config.run_dir is empty"),
    ("model.path=", "config.model.path is empty"),
    ("model.dtype=float16", "float32, bfloat16"),
    ("sample.group_size=1", "group_size=1"),
    ("mesh.fsdp=-1", "mesh.fsdp=-1 must be at least 0"),
    ("mesh.context=-1", "mesh.context=-1 must be at least 0"),
    ("sample.groups=0", "groups=0"),
    ("sample.batch_size=3", "choose a divisor of 8"),
    ("train.updates_per_epoch=3", "does not divide"),
    ("sample.sde_steps=4", "sde_range=(0, 3)"),
    ("sample.sde_range=(1, 9)", "sde_range=(1, 9)"),
    ("train.advantage_std=batch", "one of group, global"),
    ("sample.sde=ddim", "flow_grpo_wan"),
    ("train.clip_low=-1", "clip_low"),
    ("train.kl_kind=forward", "flow_grpo, "),
    ("train.learning_rate=-1", "learning_rate"),
    ("train.ema_decay=1.5", "ema_decay"),
    ("lora.rank=-2", "rank"),
    ("lora.targets=()", "targets"),
    ("eval.num_prompts=1", "num_prompts=1"),
    ("reward.rule=exact", "spelling"),
    ("reward.engine=tesseract", "rapidocr"),
    ("reward.workers=-1", "workers=-1"),
    ("reward.max_frames=0", "max_frames=0"),
    ("reward.retries=-1", "retries=-1"),
    ("reward.engine=judge", "config.reward.servers=()"),
    ("reward.judge_question=why", "transcribe, yes_no, rate"),
    ("sample.noise_level=-0.5", "noise_level"),
    ("model.remat=all", "none, block, save_matmuls"),
    ("epochs=0", "epochs=0"),
    ("sample.sde_window=left", "progressive"),
    ("train.objective=ppo", "guard"),
    ("eval.solver=heun", "euler"),
    ("model.attention=flash", "cudnn"),
    ("save.keep=0", "keep=0"),
    ("budget.evaluations=0", "budget.evaluations=0 must be above 0"),
    ("budget.seconds=-1.0", "budget.seconds=-1.0"),
    ("sample.sde_window=one_per_group", "sde_steps=2 must be 1"),
    ("eval.previews=-1", "previews=-1"),
    ("sample.shift=0", "shift"),
    ("train.kl_as=both", "one of loss, reward"),
    ("train.kl_target=-1.0", "kl_target=-1.0"),
    ("train.best_of=3", "best_of=3 best and as many worst"),
    ("eval.also_unguided=True", "no guidance to"),
    ("train.cfg_distill_weight=-1.0", "distill_weight=-1.0"),
    ("sample.ode_solver=heun", "euler, dpmpp_2m"),
    ("train.groups=3", "only sample.groups=2"),
    ("train.groups=-1", "groups=-1"),
]


def test_lora_file_without_adapters_is_refused(c):
    c.lora.init, c.lora.rank = "lora.safetensors", 0
    with pytest.raises(UserError, match=r"lora\.init=lora\.safetensors needs adapters"):
        parse.from_config(c)


def test_a_run_older_than_a_setting_is_resumed_with_its_default(c):
    saved = c.to_dict()
    del saved["lora"]["init"]
    parse.check_resume(saved, c.to_dict(), "run")
    c.lora.init = "lora.safetensors"
    with pytest.raises(UserError, match=r"lora\.init: '' -> 'lora\.safetensors'"):
        parse.check_resume(saved, c.to_dict(), "run")


def test_a_run_older_than_the_choice_of_methods_is_grpos(c):
    saved = c.to_dict()
    del saved["train"]["method"]
    parse.check_resume(saved, c.to_dict(), "run")
    c.train.method = "nft"
    with pytest.raises(UserError, match=r"train\.method: 'grpo' -> 'nft'"):
        parse.check_resume(saved, c.to_dict(), "run")


def test_a_kl_weight_left_open_is_the_methods_own(c):
    saved = c.to_dict()
    saved["train"]["kl_weight"] = 0.004  # as it was said before it could be left open
    parse.check_resume(saved, c.to_dict(), "run")
    c.train.kl_weight = 0.01
    with pytest.raises(UserError, match=r"train\.kl_weight: 0\.004 -> 0\.01"):
        parse.check_resume(saved, c.to_dict(), "run")


@pytest.mark.parametrize("override, message", BAD, ids=[b[0] for b in BAD])
def test_bad_settings_are_refused_before_any_work(c, override, message):
    key, value = override.split("=")
    section = functools.reduce(lambda part, name: part[name], key.split(".")[:-1], c)
    old = section[key.split(".")[-1]]
    with section.ignore_type():
        section[key.split(".")[-1]] = (
            value
            if isinstance(old, str)
            else eval(value)
            if isinstance(old, tuple) or old is None
            else type(old)(value)
        )
    with pytest.raises(UserError, match=re.escape(message)):
        parse.from_config(c)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (
            {"train.kl_as": "reward", "reward.combine": "advantages"},
            "reward.combine=advantages to be rewards",
        ),
        ({"train.kl_as": "reward", "train.kl_weight": 0.0}, "train.kl_weight=0.0 above 0"),
        (
            {"train.groups": 1, "sample.batch_size": 8, "train.updates_per_epoch": 1},
            "batch_size=8 must divide",
        ),
        ({"train.groups": 1}, "does not divide the epoch's 1 batches"),
        (
            {"train.groups": 1, "sample.sde_window": "one_per_group", "sample.sde_steps": 1},
            "does not go with",
        ),
        ({"train.credit": "otca", "sample.sde_steps": 1}, "sde_steps=1 leaves one"),
        ({"train.kl_reference": "average", "train.kl_as": "reward"}, "set train.kl_as=loss"),
        (
            {"train.kl_reference": "average", "train.kl_weight": 0.0},
            "kl_beta=0.0: an average as reference",
        ),
        ({"train.kl_reference": "average", "train.kl_reference_decay": 1.0}, "reference_decay=1.0"),
        (
            {"train.kl_reference": "average", "train.method": "nft"},
            "kl_reference=average is of Flow-GRPO",
        ),
        ({"train.cfg_distill_weight": 0.1, "sample.guidance": 4.5}, "set sample.guidance=4.5 to 1"),
        (
            {"train.kl_target": 0.1, "train.kl_weight_range": (0.1, 0.2)},
            "must hold the first weight, 0.004",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(c, overrides, message):
    c.update_from_flattened_dict(overrides)
    with pytest.raises(UserError, match=re.escape(message)):
        parse.from_config(c)

"""What an epoch samples: `prompts`, `sample`."""

import dataclasses

from grpo.settings.choices import ODE_SOLVERS, WINDOWS
from grpo.settings.setting import GUIDANCE, PER_PROCESS, POSITIVE, POSITIVE_OR_INF, Section, setting
from wan_jax.choices import SCHEDULES, SDE_KINDS
from wan_jax.command_line.limits import STEPS, Range


@dataclasses.dataclass(frozen=True)
class Prompts(Section):
    """The prompts. Files are text, one prompt a line with the text to write in quotes, or .jsonl."""

    train: str = setting(
        "",
        "File of the training prompts. A run that is continued may name another file with the same "
        "content.",
        path=True,
        required=True,
        per_process=True,
    )
    heldout: str = setting(
        "",
        "File of the held-out prompts, by which evaluations judge. It must not contain a training "
        "prompt.",
        path=True,
        required=True,
        **PER_PROCESS,
    )
    skip_invalid: bool = setting(
        False,
        "Whether lines of both files that cannot be scored are left out, and training prompts that "
        "are in the other file too; the run prints their number. False: they end the run.",
    )
    negative: str = setting("", "Negative prompt of the guidance, in training and evaluation.")


@dataclasses.dataclass(frozen=True)
class Sample(Section):
    """How the videos of an epoch are sampled. An epoch has groups x group_size videos."""

    frames: int = setting(1, "Frames of a video. 1 is a picture.", bounds=Range(1))
    frame_schedule: tuple[tuple[int, int], ...] = setting(
        (),
        "Changes of the number of frames: ((epoch, frames), ...), each from its epoch on, e.g. "
        "((50, 9), (100, 33)). Until the first of them `sample.frames` holds. It needs "
        "`eval.frames`. Empty: no change.",
        experimental=True,
    )
    height: int = setting(
        512, "Height of a video, in pixels; a multiple of 16 (TI2V-5B: of 32).", bounds=Range(1)
    )
    width: int = setting(
        512, "Width of a video, in pixels; a multiple of 16 (TI2V-5B: of 32).", bounds=Range(1)
    )
    size_schedule: tuple[tuple[float, ...], ...] = setting(
        (),
        "Changes of the size: ((epoch, height, width, shift), ...), each from its epoch on, e.g. "
        "((50, 480, 832, 5.0),). Each states its shift, since larger videos need a larger one. Until "
        "the first of them `sample.height`, `sample.width` and `sample.shift` hold. It needs "
        "`eval.height`, `eval.width` and `eval.shift`. Empty: no change.",
        form="(epoch, height, width, shift)",
        experimental=True,
    )
    steps: int = setting(20, "Number of denoising steps.", bounds=STEPS)
    shift: float = setting(
        3.0,
        "Shift of the noise schedule. A larger one spends more of the steps at high noise.",
        bounds=POSITIVE,
    )
    schedule: str = setting(
        "diffusers",
        "List of noise levels and timesteps. `diffusers`: that of Diffusers 0.37 and later. "
        "`legacy`: that of earlier versions and of Wan's own code, with which Flow-GRPO's runs of "
        "Wan were made.",
        choices=SCHEDULES,
    )
    guidance: float = setting(
        4.5,
        "Scale of classifier-free guidance. Up to 1 there is no guidance, which halves the cost of "
        "a step.",
        bounds=GUIDANCE,
    )
    guidance_2: float | None = setting(
        None,
        "Scale of guidance of the second expert, in models with two. None: that of the first.",
        bounds=GUIDANCE,
    )
    groups: int = setting(48, "Groups of an epoch: the number of its prompts.", bounds=Range(1))
    group_size: int = setting(
        12, "Videos of a group: how many are sampled of each prompt.", bounds=Range(2, 1000)
    )
    batch_size: int = setting(
        9,
        "Videos of a rollout batch and of a micro-batch of the update, over all devices. It "
        "divides groups x group_size.",
        bounds=Range(1),
    )
    reward_guidance: float = setting(
        0.0,
        "Weight of reward guidance in the rollout, of methods without an importance ratio: the velocity "
        "is shifted by this times the gradient of a reward head (docs/explanation/algorithms.md). "
        "Evaluations are not guided. 0: none.",
        bounds=Range(0),
        experimental=True,
    )
    reward_head: str = setting(
        "",
        "File of the reward head, written by `python -m grpo.reward_head`. A run that is continued has the head "
        "of its checkpoint.",
        path=True,
        experimental=True,
    )
    shared_noise: bool = setting(
        False,
        "Whether the videos of a group start from one noise. The steps before the first stochastic "
        "one are then the same for all of them, and are computed once for the group.",
        experimental=True,
    )
    sde: str = setting(
        "flow_grpo_wan",
        "Form of the noise of stochastic steps: `flow_grpo_wan` (Flow-GRPO's code for Wan), "
        "`flow_sde` (Flow-GRPO's paper), `dance` (DanceGRPO), `cps` (coefficients-preserving "
        "sampling).",
        choices=SDE_KINDS,
    )
    ode_solver: str = setting(
        "euler",
        "Solver of the steps that are not stochastic. `dpmpp_2m` is DPM-Solver++(2M), as in "
        "MixGRPO-Flash.",
        choices=ODE_SOLVERS,
        experimental=("dpmpp_2m",),
    )
    noise_level: float | None = setting(
        None,
        "Amount of noise of stochastic steps; `grpo` needs some. None: the form's own, 1.0 for "
        "flow_grpo_wan, 0.7 for flow_sde, 0.3 for dance, 0.8 for cps.",
        bounds=Range(0),
    )
    max_step_std: float | None = setting(
        None,
        "Bound of the standard deviation of the noise that one step adds; latents have unit "
        "variance. inf: no bound. None: 1.0 for flow_sde, no bound for the others.",
        bounds=POSITIVE_OR_INF,
    )
    sde_steps: int = setting(
        19,
        "Number of steps of an epoch that are stochastic, and so trained. The other steps follow "
        "the ODE, but see `sample.untrained_noise`.",
        bounds=Range(1),
    )
    sde_range: tuple[int, int] = setting(
        (0, 19),
        "Range of the steps that may be stochastic. Steps are counted from 0, and the second number "
        "is not included.",
        bounds=Range(0),
        form="(first, last + 1)",
    )
    untrained_noise: bool = setting(
        False,
        "For `grpo`: whether the steps that are not trained are stochastic too. In Flow-GRPO's code "
        "for Wan all 20 steps are stochastic, and the last is not trained. False: they follow the ODE.",
    )
    sde_window: str = setting(
        "any",
        "Rule by which an epoch draws its stochastic steps from `sample.sde_range`. `any`: any "
        "subset. `spaced`: the same steps in every epoch, spread evenly from the first on; with half as "
        "many steps every second one (DDRL). `random`: neighbouring steps at a random place "
        "(Flow-GRPO-Fast). `progressive`, `decay`, `exp_decay`: neighbouring steps that slide from the "
        "first to the last (MixGRPO); "
        "with the last two they stay fewer epochs at later steps. `one_per_group`: one step, "
        "another for each group (Flash-GRPO); it needs sde_steps=1.",
        choices=WINDOWS,
        experimental=("spaced", "decay", "exp_decay"),
    )
    sde_window_epochs: int = setting(
        25, "Epochs that a sliding window stays at its first place.", bounds=Range(1)
    )

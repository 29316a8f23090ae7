"""How an epoch's videos train the model: `train`."""

import dataclasses
import math

from grpo.settings.choices import (
    ALARMS,
    CREDITS,
    KL_KINDS,
    KL_PLACES,
    KL_REFERENCES,
    METHODS,
    OBJECTIVES,
    STDS,
    ZERO_ADVANTAGES,
)
from grpo.settings.setting import FRACTION, GUIDANCE, POSITIVE, POSITIVE_OR_INF, Section, setting
from wan_jax.choices import DTYPES, EXPERTS
from wan_jax.command_line.limits import Range


@dataclasses.dataclass(frozen=True)
class Train(Section):
    """The method, its loss, and the optimiser. Updates are optimiser steps of one expert."""

    method: str = setting(
        "nft",
        "Training method, explained in docs/explanation/algorithms.md. `grpo` is Flow-GRPO, which trains on the "
        "stochastic steps of the rollout. All others train on finished videos, noised again; `nft` "
        "is DiffusionNFT.",
        choices=METHODS,
    )
    timesteps: int = setting(
        4,
        "For the methods on finished videos: noise levels of a video in an epoch. Two experts share "
        "them. At most `sample.steps`.",
        bounds=Range(1),
    )
    nft_beta: float = setting(
        0.1,
        "For `nft`: distance of its positive and negative policies from the behaviour policy.",
        bounds=POSITIVE,
    )
    old_rate: float = setting(
        1e-3,
        "For `nft`: after n updates the behaviour policy, which samples, keeps min(old_rate n, "
        "old_most) of itself at the end of an epoch. The rest is the trained policy.",
        bounds=Range(0),
    )
    old_most: float = setting(
        0.5, "For `nft`: the largest share that the behaviour policy keeps.", bounds=FRACTION
    )
    dpo_beta: float = setting(
        100.0,
        "For `dpo`: beta of its loss, -log sigmoid(-beta / 2 x margin). It is the strength of the "
        "preference and of the constraint to the reference.",
        bounds=POSITIVE,
    )
    reference_every: int = setting(
        0,
        "For `dpo`: updates after which the policy becomes the reference (online DPO). 0: the "
        "reference is the base model.",
        bounds=Range(0),
        experimental=True,
    )
    dgpo_beta: float = setting(
        100.0,
        "For `dgpo`: beta of its loss. A group whose better videos have improved on the reference counts "
        "less, the more so the larger beta is.",
        bounds=POSITIVE,
        experimental=True,
    )
    dgpo_clip: float = setting(
        1e-3,
        "For `dgpo`: how far the ratio exp(d_old - d) of a video may move from 1 in the direction of its "
        "advantage before the video has no gradient, with its flow-matching error d. inf: any distance.",
        bounds=POSITIVE_OR_INF,
        experimental=True,
    )
    tgo_temperature: float = setting(
        1e-3,
        "For `tgo`: divisor of the difference between the reference's error and the policy's.",
        bounds=POSITIVE,
        experimental=True,
    )
    tgo_confidence: float = setting(
        5.0,
        "For `tgo`: c in a video's weight, 1 + c |score - median|. 0: all weights are equal.",
        bounds=Range(0),
        experimental=True,
    )
    temperature: float = setting(
        1.0,
        "For `rwr`: a video's weight is exp(reward / temperature) over its mean in the group.",
        bounds=POSITIVE,
    )
    guided: bool = setting(
        False,
        "For the methods on finished videos: whether the velocity with `sample.guidance` is trained, "
        "at twice the forward passes. False: the conditional velocity, as published.",
        experimental=True,
    )
    experts: tuple[str, ...] = setting(
        EXPERTS,
        "Experts that are trained. Models with one expert have only the first.",
        choices=EXPERTS,
    )
    groups: int = setting(
        0,
        "Number of groups of an epoch that are trained: those whose rewards differ most. 0: all.",
        bounds=Range(0),
        experimental=True,
    )
    best_of: int = setting(
        0,
        "Number of best videos of each group that are trained, and of worst ones. 0: all videos "
        "are trained.",
        bounds=Range(0),
        experimental=True,
    )
    updates_per_epoch: int = setting(
        2, "Updates that the batches of an epoch are divided among.", bounds=Range(1)
    )
    learning_rate: float = setting(
        1e-4,
        "Learning rate of AdamW.",
        bounds=Range(0, 1, above=True, below=True, note="1e-4 is usual"),
        resume=True,
    )
    warmup_updates: int = setting(
        0, "Updates in which the learning rate rises linearly to its value.", bounds=Range(0)
    )
    adam_b1: float = setting(0.9, "Decay of AdamW's first moment.", bounds=FRACTION)
    adam_b2: float = setting(0.999, "Decay of AdamW's second moment.", bounds=FRACTION)
    adam_eps: float = setting(1e-8, "Term that AdamW adds to its divisor.", bounds=POSITIVE)
    weight_decay: float = setting(1e-4, "Weight decay of AdamW.", bounds=Range(0), resume=True)
    max_grad_norm: float = setting(
        1.0,
        "Norm above which gradients are scaled down to it. inf: never.",
        bounds=POSITIVE_OR_INF,
        resume=True,
    )
    ema_decay: float = setting(
        0.9,
        "Decay of the average of the trained weights, which evaluations and exports use. It starts "
        "lower: min((1 + n) / (10 + n), ema_decay) after n updates. 0: no average, the weights themselves.",
        bounds=FRACTION,
    )
    moments_dtype: str = setting(
        "float32",
        "Type in which AdamW's moments are kept between updates, in memory and in checkpoints. `bfloat16`: "
        "half the bytes, rounded stochastically; they are computed in float32.",
        choices=DTYPES,
    )
    offload_optimiser: bool = setting(
        False,
        "Whether moments and averages are offloaded to host memory between updates.",
        resume=True,
    )
    objective: str = setting(
        "clip",
        "Policy loss of `grpo`: `clip` (clipped ratio), `unscaled` (ratio without the step's "
        "variance, as with CPS), `guard` (GRPO-Guard), `dppo` (Flow-DPPO).",
        choices=OBJECTIVES,
        experimental=("dppo",),
    )
    divergence: float = setting(
        1e-5,
        "For `dppo`: divergence from the sampling policy at which a step of a video is left out.",
        bounds=POSITIVE,
        experimental=True,
    )
    credit: str = setting(
        "none",
        "Weight of each trained step in the loss. `none`: all are equal. `longcat`, `rectified` "
        "(Flash-GRPO) and `noise_over_step` (a revision of Flow-GRPO's code for Wan) follow from the "
        "schedule; `otca` depends on the progress of each video.",
        choices=CREDITS,
        experimental=("longcat", "rectified", "noise_over_step", "otca"),
    )
    box_credit: float = setting(
        0.0,
        "How much more the cells of a video's latents count in the loss where the OCR engine read "
        "text. 0: all cells count alike. Close to 1: the others hardly count "
        "(docs/explanation/algorithms.md). It needs an OCR engine on this machine.",
        bounds=FRACTION,
        experimental=True,
    )
    box_kl: bool = setting(
        False,
        "With `train.box_credit`: whether the KL holds only the cells in which no text was read, so that "
        "letters are free and the background stays. A video without text is held everywhere.",
        experimental=True,
    )
    clip_low: float = setting(
        1e-3,
        "Lower clip range: the ratio is clipped at 1 - clip_low. Log-probs are means over a video's "
        "values, so usual ranges are 1e-6 to 1e-3.",
        bounds=Range(0, 1, above=True),
    )
    clip_high: float = setting(
        1e-3, "Upper clip range: the ratio is clipped at 1 + clip_high.", bounds=POSITIVE
    )
    kl_weight: float | None = setting(
        None,
        "Weight of the KL to the reference. For the methods on finished videos it is the weight of "
        "mean((v - v_ref)^2), with velocities v; `dpo` and `tgo` have none. None: the method's own, e.g. 0.004 "
        "for `grpo` and 1e-4 for `nft`.",
        bounds=Range(0),
    )
    kl_as: str = setting(
        "loss",
        "Where the KL counts. `loss`: it is added to the loss. `reward`: it is computed while "
        "sampling, and kl_weight times it is subtracted from the reward of each step.",
        choices=KL_PLACES,
        experimental=("reward",),
    )
    kl_reference: str = setting(
        "base",
        "Reference of the KL of `grpo`. `base`: the model before training. `average`: an average of "
        "the trained weights.",
        choices=KL_REFERENCES,
        experimental=("average",),
    )
    kl_reference_decay: float = setting(
        0.99,
        "With train.kl_reference=average: the share of itself that the average keeps in every update.",
        bounds=FRACTION,
        experimental=True,
    )
    kl_gate: float | None = setting(
        None,
        "Share of an epoch's videos that the KL holds: those whose main reward ranks furthest above "
        "their other measured rewards (docs/explanation/algorithms.md). None: all videos.",
        bounds=Range(0, 1, above=True, below=True),
        experimental=True,
    )
    kl_target: float | None = setting(
        None,
        "KL that its weight is adapted to; train.kl_weight is then the first weight. None: the weight is "
        "constant.",
        bounds=POSITIVE,
        experimental=True,
    )
    kl_horizon: float = setting(
        20.0,
        "Updates in which a KL of twice the target multiplies the weight by e.",
        bounds=POSITIVE,
        experimental=True,
    )
    kl_weight_range: tuple[float, float] = setting(
        (1e-4, 1.0),
        "Range of the weight that `train.kl_target` adapts.",
        bounds=POSITIVE,
        form="(lowest, highest)",
        experimental=True,
    )
    kl_kind: str = setting(
        "flow_grpo",
        "Form of the KL. `flow_grpo`: of the Gaussians of the step, per dimension. `sigma`: the same "
        "without the step's length. `x`: squared difference of the means. `velocity`: squared "
        "difference of the velocities.",
        choices=KL_KINDS,
        experimental=("sigma", "x", "velocity"),
    )
    cfg_distill_weight: float = setting(
        0.0,
        "Weight of a loss that pulls the velocity without guidance to the reference's velocity with "
        "guidance. It needs sample.guidance=1. 0: no such loss.",
        bounds=Range(0),
        experimental=True,
    )
    cfg_distill_guidance: float = setting(
        4.5,
        "Scale of guidance of the reference in the loss of `train.cfg_distill_weight`; above 1.",
        bounds=GUIDANCE,
        experimental=True,
    )
    cfg_distill_guidance_2: float | None = setting(
        None,
        "The same for the reference's second expert, in models with two. None: as for the first.",
        bounds=GUIDANCE,
        experimental=True,
    )
    advantage_std: str = setting(
        "group",
        "Standard deviation that advantages are divided by: of the `group`'s rewards, of all rewards "
        "(`global`), the largest of any group (`max`), or `none` (Dr. GRPO).",
        choices=STDS,
        experimental=("global", "max", "none"),
    )
    advantage_exp: bool = setting(
        False,
        "Whether an advantage A becomes -exp(-A), as in DDRL's paper; its published settings leave it "
        "out. Groups of equal rewards keep 0.",
        experimental=True,
    )
    advantage_clip: float = setting(
        5.0,
        "Largest absolute value of an advantage. `nft` also divides advantages by it. inf: no bound.",
        bounds=POSITIVE_OR_INF,
    )
    min_group_std: float = setting(
        0.0,
        "Standard deviation of a group's rewards (their weighted sum) below which its videos have "
        "advantage 0, as those of a group of equal rewards: differences as small as the reader's noise "
        "teach nothing. 0: all differences count.",
        bounds=Range(0),
        experimental=True,
    )
    max_velocity_distance: float = setting(
        math.inf,
        "For `nft`, `awm`, `dpo` and `tgo`: bound of the mean of |v - v_old|^2 and |v - v_ref|^2 in an "
        "update, the squared distance of the velocity from that of the behaviour policy and of the "
        "KL's reference. Beyond it the run ends, with everything saved. inf: no bound, and `nft` does not "
        "measure the distance from v_old.",
        bounds=POSITIVE_OR_INF,
        resume=True,
        experimental=True,
    )
    on_alarm: str = setting(
        "log",
        "What the guard does where an evaluation shows a measure of `reward.panel` outside the "
        "tolerance, a fallen reward, or groups that have become too alike. `log`: it prints and "
        "records the alarm. `stop`: it ends the run too, with everything saved. `kl`: while the "
        "alarm lasts, the weight of the KL is `train.alarm_kl`.",
        choices=ALARMS,
        resume=True,
    )
    alarm_tolerance: float = setting(
        1.5,
        "How far the mean of a measure of `reward.panel` may move from the base model's on the "
        "held-out prompts, in standard deviations of the base model's videos. inf: any distance.",
        bounds=POSITIVE_OR_INF,
        resume=True,
    )
    alarm_spread: float = setting(
        0.5,
        "How different the videos of a group must stay, as a share of the starting model's spread: "
        "the alarm is raised if the mean since the last evaluation is below it. 0: never.",
        bounds=FRACTION,
        resume=True,
    )
    alarm_kl: float = setting(
        1.0,
        "Weight of the KL while the alarm lasts, with train.on_alarm=kl; above train.kl_weight, "
        "which may be 0.",
        bounds=POSITIVE,
        resume=True,
        experimental=True,
    )
    alarm_calm: int = setting(
        2,
        "Evaluations in a row without an alarm after which the KL has its own weight again.",
        bounds=Range(1),
        resume=True,
        experimental=True,
    )
    zero_advantages: str = setting(
        "keep",
        "For `grpo`: what becomes of videos whose advantages are all 0, as in groups of equal rewards. "
        "`keep`: they count in the means of loss and KL. `drop`: they do not, as in Flow-GRPO's code.",
        choices=ZERO_ADVANTAGES,
    )
    ratio_tolerance: float | None = setting(
        None,
        "Deviation of the importance ratio from 1 that ends the run, in the first update of an epoch, "
        "which is on-policy. inf: it is not checked. None: 1e-4 where products of "
        "float32 are exact, 2e-3 in bfloat16 and in TF32, the default of NVIDIA GPUs.",
        bounds=Range(0, math.inf, below=False),
        resume=True,
    )

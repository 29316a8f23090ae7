"""What a run evaluates, logs and saves: `eval`, `log`, `save`."""

import dataclasses

from grpo.settings.setting import GUIDANCE, POSITIVE, Section, setting
from wan_jax.choices import SCHEDULES, SOLVERS
from wan_jax.command_line.limits import SEED, STEPS, Range


@dataclasses.dataclass(frozen=True)
class Eval(Section):
    """Evaluation on held-out prompts: before the first epoch, every N epochs, after the last one."""

    every: int = setting(20, "Epochs between evaluations.", bounds=Range(1))
    num_prompts: int = setting(
        256,
        "Number of held-out prompts, the first of their file, or all where it has fewer. Each has one "
        "video.",
        bounds=Range(2),
    )
    frames: int = setting(
        0,
        "Frames of the videos by which the run is judged. 0: `sample.frames`.",
        bounds=Range(0),
    )
    height: int = setting(
        0,
        "Height of the videos by which the run is judged, in pixels. 0: `sample.height`.",
        bounds=Range(0),
    )
    width: int = setting(
        0,
        "Width of the videos by which the run is judged, in pixels. 0: `sample.width`.",
        bounds=Range(0),
    )
    shift: float | None = setting(
        None,
        "Shift of the noise schedule of evaluations. None: `sample.shift`, which is allowed only if they "
        "have the size of training.",
        bounds=POSITIVE,
    )
    more_frames: tuple[int, ...] = setting(
        (),
        "Further numbers of frames, e.g. (9, 33). Each has separate evaluations with a separate log.",
        bounds=Range(1),
    )
    more_sizes: tuple[tuple[float, ...], ...] = setting(
        (),
        "Further sizes, ((height, width, frames), ...), e.g. ((480, 832, 33),). A fourth number is the "
        "shift of a size; without it, the shift is that of the other evaluations. Each has separate evaluations with "
        "a separate log, evals_480x832_33_frames.jsonl. They do not choose the best checkpoint.",
        form="(height, width, frames) or (height, width, frames, shift)",
    )
    more_prompts: tuple[tuple[str, str], ...] = setting(
        (),
        "Further files of held-out prompts by name, e.g. "
        '`c.eval.more_prompts = {"long": "prompts/heldout_long.jsonl"}`, on the command line '
        "`--config.eval.more_prompts=long=FILE,short=FILE`. Each has separate evaluations of its first "
        "`eval.num_prompts` prompts with a separate log, evals_NAME.jsonl. They do not choose the best "
        "checkpoint.",
        named=str,
    )
    steps: int = setting(20, "Number of denoising steps.", bounds=STEPS)
    guidance: float = setting(
        4.5,
        "Scale of classifier-free guidance. Up to 1 there is no guidance.",
        bounds=GUIDANCE,
    )
    guidance_2: float | None = setting(
        None,
        "Scale of guidance of the second expert, in models with two. None: that of the first.",
        bounds=GUIDANCE,
    )
    also_unguided: bool = setting(
        False,
        "Whether each evaluation is made a second time without guidance, logged as `unguided`.",
    )
    solver: str = setting(
        "unipc",
        "ODE solver. `euler` is the solver of training, `flow_match_euler` and `unipc` are those "
        "of Diffusers' schedulers, `dpmpp_2m` is DPM-Solver++(2M).",
        choices=SOLVERS,
    )
    schedule: str = setting(
        "sample",
        "List of noise levels and timesteps. `sample`: that of `sample.schedule`. The solver "
        "`flow_match_euler` has its own.",
        choices=("sample", *SCHEDULES),
    )
    seed: int = setting(
        1234,
        "Seed of the initial noise. All evaluations with one seed start from the same noise.",
        bounds=SEED,
    )
    previews: int = setting(
        12, "Number of videos that are kept as pictures for the report.", bounds=Range(0)
    )


@dataclasses.dataclass(frozen=True)
class WandB(Section):
    """Weights & Biases, besides the run's own files and TensorBoard."""

    project: str = setting(
        "",
        "Project that the run is logged to. Empty: Weights & Biases is not used. With the "
        "environment variable WANDB_MODE=offline the run stays on this machine.",
    )
    entity: str = setting("", "User or team of the project. Empty: the account's default.")


@dataclasses.dataclass(frozen=True)
class MLflow(Section):
    """MLflow, besides the run's own files and TensorBoard."""

    uri: str = setting(
        "",
        "Tracking server, e.g. http://host:5000, or sqlite:///FILE. Names and passwords belong in "
        "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD. Empty: MLflow is not used.",
    )
    experiment: str = setting("wan-jax-grpo", "Experiment that the run is logged to.")


@dataclasses.dataclass(frozen=True)
class Log(Section):
    """Trackers, besides the run's own files and TensorBoard."""

    wandb: WandB = dataclasses.field(default_factory=WandB)
    mlflow: MLflow = dataclasses.field(default_factory=MLflow)


@dataclasses.dataclass(frozen=True)
class Save(Section):
    """Checkpoints."""

    every: int = setting(
        10, "Epochs between checkpoints. The last epoch is always saved.", bounds=Range(1)
    )
    keep: int = setting(3, "Number of newest checkpoints that are kept.", bounds=Range(1))
    best: bool = setting(
        True,
        "Whether the checkpoint that the guard finds best is kept too, as RUN/best: the highest "
        "lower bound of the held-out main reward, with a panel within `train.alarm_tolerance`. Every "
        "evaluated epoch is then saved.",
    )

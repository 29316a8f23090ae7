"""Training from Python: `train(recipe("configs/tiny_ocr.py", epochs=2), reward=my_function)`.

docs/reference/python.md has all functions with an example. They do what the commands do, by the same code, and
write the same folders. Importing this module imports JAX.
"""

import contextlib
import copy
import dataclasses
import os
import pathlib
import re
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import ml_collections
import numpy as np
from absl import flags
from ml_collections import config_flags

from configs.defaults import defaults
from grpo import evaluate as evaluation
from grpo import train as training
from grpo.data.prompts import PromptSet
from grpo.records import run_log
from grpo.scoring import scores
from grpo.scoring.reward_combination import MAIN
from grpo.scoring.reward_pool import open_pool
from grpo.scoring.scored_prompts import for_rewards
from grpo.settings import parse, validation
from grpo.settings.schema import BUILT_IN, main_reward, measured_rewards, values_of
from rewards.ocr.targets import parse_targets
from wan_jax import api as sampling
from wan_jax.command_line import cli, parsing, recipe_files
from wan_jax.errors import UserError
from wan_jax.inference.pipeline import Videos as Decoded
from wan_jax.storage import checkpoint as checkpoint_lib

FORMATS = ("diffusers", "lora", "comfyui", "peft")  # that `export` writes


def recipe(name: str | os.PathLike, /, **settings: Any) -> Any:
    """Return the recipe of a file as a ConfigDict, with other settings.

    name: path of a Python file with `get_config()`, or the name of one in `configs/`. Its folder is
    added to `sys.path`, for rewards in files beside it. settings: by name, those of a section as a
    dict: `recipe("tiny_ocr", epochs=2, train={"learning_rate": 1e-4})`. Raises `UserError` where
    there is no such recipe or setting.
    """
    found = recipe_files.recipe_path(os.fspath(name))
    folder = str(pathlib.Path(found.partition(":")[0]).resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    values, argv = flags.FlagValues(), ["grpo.api", f"--config={found}"]
    config_flags.DEFINE_config_file(
        "config", None, flag_values=values, sys_argv=argv, lock_config=False
    )
    try:
        values(argv)
        config: Any = values["config"].value
        _change(config, settings)
    except parsing.FLAG_ERRORS as error:
        raise UserError(parsing.flag_message(error)) from None
    validation.check_keys(config)
    return config


def _change(config: Any, settings: Mapping[str, Any], prefix: str = "") -> None:
    """Set settings of a ConfigDict. Raises `UserError` on a value of another type."""
    for name, value in settings.items():
        section = config.get(name)
        if isinstance(section, ml_collections.ConfigDict) and isinstance(value, Mapping):
            _change(section, value, f"{prefix}{name}.")
            continue
        try:
            config[name] = value
        except (TypeError, ValueError) as error:
            raise UserError(f"config.{prefix}{name}={value!r}: {error}") from None


@dataclasses.dataclass(frozen=True)
class Run:
    """A run of training, by its folder."""

    folder: pathlib.Path

    @property
    def epochs(self) -> list[dict]:
        """The records of its epochs (metrics.jsonl), oldest first."""
        return run_log.read_metrics(self.folder)

    @property
    def evaluations(self) -> list[dict]:
        """The records of its evaluations (evals.jsonl), oldest first: "epoch", "reward", "low" and
        "high" of the 95 % interval, and for each prompt "rewards" and "texts".
        """
        return run_log.read_evaluations(self.folder)

    @property
    def model(self) -> "sampling.Model":
        """The model with the weights of the newest checkpoint, to sample from."""
        return sampling.load(_model_of(self.folder), self.folder)


def train(config: Any, reward: Any = None) -> Run:
    """Train by a recipe, or continue the run in its folder, as `wan-train` does.

    config: of `recipe`; it is not changed. reward: a function (video, request) -> score, or an object
    with `score` or `score_group` (docs/howto/own_rewards.md). It scores in this process, in one thread:
    it may be defined in a notebook, it holds Python's interpreter lock while it computes in Python,
    and nothing ends it if it hangs. It is measured by its name, with weight 1, and the recipe's
    rewards are measured without a weight, unless the recipe has `reward.weights.NAME`.

    Ctrl-C raises KeyboardInterrupt at once; the same call continues after the last saved epoch.
    SIGTERM ends the run after its epoch. Raises `UserError`.
    """
    changed, objects = _with_reward(config, reward)
    with _signals_restored():
        training.train_recipe(changed, objects)
    return Run(pathlib.Path(changed.run_dir))


def evaluate(
    config: Any,
    checkpoint: "str | os.PathLike | Run | None" = None,
    *,
    out: str | os.PathLike,
    base: bool = True,
    reward: Any = None,
) -> list[dict]:
    """Evaluate the model of a recipe, and a checkpoint, on held-out prompts, as `wan-evaluate` does.

    Returns the records: the model's, unless `base` is false, then the checkpoint's. checkpoint: a
    run, RUN/best or RUN/checkpoints/EPOCH. out: folder to write. reward: as in `train`. Raises
    `UserError`.
    """
    changed, objects = _with_reward(config, reward)
    trained = None if checkpoint is None else _path(checkpoint)
    return evaluation.evaluate_recipe(changed, os.fspath(out), trained, base=base, own=objects)


def score(
    videos: "sampling.Videos", reward: Any = None, config: Any = None
) -> scores.GatheredScores:
    """Score N videos: by a reward as in `train`, by the rewards of a recipe, or, with neither, by
    reading the text that their prompts quote.

    Returns `values`, float64 [N], nan where `valid` is false: what failed or is not finite; `texts`,
    what was read; `parts`, {name: float64 [N]} of several rewards; `why()`. Raises `UserError` where a
    reward that reads text has a prompt without quotes.
    """
    changed, objects = _with_reward(defaults() if config is None else config, reward)
    settings, weights = changed.reward, dict.fromkeys(objects or [MAIN], 1.0)
    if config is not None:
        checked = parse.recipe_from_config(changed)
        settings, weights = checked.reward, measured_rewards(checked)
    prompts = tuple(dict.fromkeys(videos.prompts))
    number_of = {prompt: i for i, prompt in enumerate(prompts)}
    with cli.user_input():
        targets = tuple(parse_targets(prompt) if MAIN in weights else () for prompt in prompts)
        records = for_rewards(PromptSet(prompts, targets), weights, videos.fps).targets
    each = [records[number_of[prompt]] for prompt in videos.prompts]
    size = len(videos) // len(prompts)
    if list(videos.prompts) != [prompt for prompt in prompts for _ in range(size)]:
        size = 1  # the videos of a prompt do not follow each other
    with open_pool(settings, weights, objects) as pool:
        decoded = Decoded(videos.frames, np.asarray(videos.finite))
        pending = scores.submit(pool, np.arange(len(videos)), decoded, each, size)
        return scores.gather_scores([pending], len(videos), main_reward(weights))


def export(
    checkpoint: "str | os.PathLike | Run",
    dst: str | os.PathLike,
    format: str = "diffusers",
    *,
    model: str | os.PathLike | None = None,
    overwrite: bool = False,
) -> None:
    """Write trained weights for other programs.

    format: "diffusers", a folder for `WanPipeline.from_pretrained`; "lora" or "comfyui", a file for
    `load_lora_weights` or ComfyUI; "peft", a folder. model: of the run; None: where it was in
    training. Raises `UserError`.
    """
    from convert import export_lora, to_diffusers

    if format not in FORMATS:
        raise UserError(f"format={format!r} must be one of {', '.join(FORMATS)}")
    trained = _path(checkpoint)
    src = _model_of(trained) if model is None else os.fspath(model)
    if format == "diffusers":
        to_diffusers.export(src, dst, trained, overwrite=overwrite)
    else:
        layout = "diffusers" if format == "lora" else format
        export_lora.export(trained, src, dst, layout, overwrite=overwrite)


# --- Rewards of this process ----------------------------------------------------------------------


def _with_reward(config: Any, reward: Any) -> tuple[Any, dict[str, Any]]:
    """Return a copy of a recipe with a reward of this process, and the reward by its name."""
    changed = copy.deepcopy(config)
    for key in ("own", "own_weights"):  # a copied ConfigDict makes ConfigDicts of them
        changed.reward[key] = copy.copy(config.reward[key])
    if reward is None:
        return changed, {}
    name, target = _names(reward)
    weights = changed.reward.weights
    if name not in weights and name not in dict(values_of(changed)["reward.own_weights"]):
        for other in weights:
            if weights[other]:
                weights[other] = 0.0
        with changed.unlocked():
            weights[name] = 1.0
    changed.reward.workers = max(1, changed.reward.workers)  # none means this process for all
    changed.reward.own = {**dict(changed.reward.own or {}), name: target}
    return changed, {name: reward}


def _names(reward: Any) -> tuple[str, str]:
    """Return the name of a reward, and what the recipe records of it, 'module:name'."""
    named = reward if hasattr(reward, "__qualname__") else type(reward)
    words = [
        re.sub(r"\W+", "", word) for word in named.__qualname__.split(".") if word != "<locals>"
    ]
    name = words[-1] if words[-1] not in BUILT_IN else f"own_{words[-1]}"
    return name, f"{named.__module__}:{'.'.join(words)}"


@contextlib.contextmanager
def _signals_restored() -> Iterator[None]:
    """Restore the program's handlers of signals after a run, which has its own, and end the program
    if SIGTERM asked for it.
    """
    if threading.current_thread() is not threading.main_thread():
        raise UserError("train handles signals: call it in the program's main thread")
    numbers = signal.SIGINT, signal.SIGTERM
    before = [signal.getsignal(number) for number in numbers]
    wakeup = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
    cli.received.clear()
    try:
        yield
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
    if cli.received:
        signal.raise_signal(cli.received[0])


# --- Checkpoints ----------------------------------------------------------------------------------


def _path(checkpoint: "str | os.PathLike | Run") -> str:
    return os.fspath(checkpoint.folder if isinstance(checkpoint, Run) else checkpoint)


def _model_of(checkpoint: str | os.PathLike) -> str:
    """Return the folder of the model that a checkpoint was trained from."""
    checkpoints, epoch = checkpoint_lib.find(checkpoint)
    return checkpoints.meta(epoch)["model"]

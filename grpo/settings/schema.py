"""All settings of a recipe: `Recipe`, and the table `SETTINGS` that follows from it.

Each setting is declared once, in the sections. The defaults of `configs.defaults`, the checks
(`grpo.settings.validation`), the reference (`docs/reference/settings.md`) and the settings that a continued run
may change follow from the declarations. Recipes import this module, so it does not import JAX.
"""

import dataclasses
import operator
import typing
from collections.abc import Iterator, Mapping
from dataclasses import field

from grpo.settings.budget import Budget
from grpo.settings.named import own_names, pairs
from grpo.settings.sections.data import Data
from grpo.settings.sections.model import LoRA, Mesh, Model
from grpo.settings.sections.records import Eval, Log, Save
from grpo.settings.sections.reward import Reward, Weights
from grpo.settings.sections.sample import Prompts, Sample
from grpo.settings.sections.train import Train
from grpo.settings.setting import PER_PROCESS, RESUME, Section, Setting, declared, setting
from wan_jax.command_line.limits import SEED, Range


@dataclasses.dataclass(frozen=True)
class Recipe(Section):
    """The run as a whole.

    A recipe has all settings of a run, with the keys of the ConfigDict of `configs.defaults`.
    """

    run_dir: str = setting(
        "",
        "Folder of the run: checkpoints, logs, report. A run that is there is continued after its "
        "newest checkpoint.",
        path=True,
        required=True,
        **PER_PROCESS,
    )
    seed: int = setting(
        0,
        "Seed of the run. Every random draw is a function of (seed, epoch, sample, step).",
        bounds=SEED,
    )
    epochs: int = setting(
        200,
        "Number of epochs. An epoch samples groups of videos, scores them and updates the model.",
        bounds=Range(1),
        resume=True,
    )
    budget: Budget = field(default_factory=Budget, metadata=RESUME)
    model: Model = field(default_factory=Model)
    lora: LoRA = field(default_factory=LoRA)
    mesh: Mesh = field(default_factory=Mesh, metadata=RESUME)
    prompts: Prompts = field(default_factory=Prompts)
    sample: Sample = field(default_factory=Sample)
    train: Train = field(default_factory=Train)
    data: Data = field(default_factory=Data)
    reward: Reward = field(default_factory=Reward)
    eval: Eval = field(default_factory=Eval, metadata=RESUME)
    log: Log = field(default_factory=Log, metadata=PER_PROCESS)
    save: Save = field(default_factory=Save, metadata=RESUME)

    def to_dict(self) -> dict:
        """Return nested dicts with sorted keys, as the recipe's ConfigDict does."""
        return _sorted(dataclasses.asdict(self))


SECOND_READER = "second_reader"  # the reward of `reward.second_engine`
TEXT_AREA = "text_area"  # the measure that needs the boxes of the text
BUILT_IN = (*(f.name for f in dataclasses.fields(Weights)), SECOND_READER)  # names of rewards
SETTINGS: Mapping[str, Setting] = {entry.key: entry for entry in declared(Recipe)}


def values_of(recipe) -> dict[str, typing.Any]:
    """Return the value of every setting by key, e.g. 'train.learning_rate'; tuples as tuples.

    recipe: a `Recipe`, or a ConfigDict with the same keys.
    """
    return {key: as_tuples(operator.attrgetter(key)(recipe)) for key in SETTINGS}


def make_recipe(values: Mapping[str, object]) -> Recipe:
    """Return the recipe with the value of every setting by key. Whole numbers become floats where the
    setting is a float. The values are not checked.
    """
    return _make(Recipe, values, "")


def _make(kind: type, values: Mapping[str, object], prefix: str):
    """Return a section with the values of the settings that have the prefix."""
    hints = typing.get_type_hints(kind)
    fields = {}
    for name in (f.name for f in dataclasses.fields(kind)):
        key, hint = f"{prefix}{name}", hints[name]
        fields[name] = (
            _make(hint, values, f"{key}.")
            if isinstance(hint, type) and dataclasses.is_dataclass(hint)
            else _typed(SETTINGS[key], values[key])
        )
    return kind(**fields)


def _typed(entry: Setting, value):
    """Return a value in the type of its setting: lists as tuples, whole numbers as floats."""
    value = as_tuples(value)
    if entry.kind is float and isinstance(value, int):
        return float(value)
    return tuple(map(float, value)) if entry.elements is float else value


def as_tuples(value):
    """Return a value with its lists as tuples, at any depth."""
    return tuple(map(as_tuples, value)) if isinstance(value, (list, tuple)) else value


def _sorted(values: dict) -> dict:
    return {
        key: _sorted(value) if isinstance(value, dict) else value
        for key, value in sorted(values.items())
    }


def sections() -> Iterator[tuple[str, type]]:
    """Yields the prefix of the keys ('', 'budget.', ..., 'log.wandb.') and the class of each section."""
    yield from _sections(Recipe, "")


def _sections(kind: type, prefix: str) -> Iterator[tuple[str, type]]:
    yield prefix, kind
    for name, hint in typing.get_type_hints(kind).items():
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            yield from _sections(hint, f"{prefix}{name}.")


def is_marked(key: str, mark: str) -> bool:
    """Return whether a setting has a mark ('resume' or 'per_process').

    A key that is not a setting, of a run of an earlier version, has the marks of its section.
    """
    if key in SETTINGS:
        return getattr(SETTINGS[key], mark)
    first = {f.name: f for f in dataclasses.fields(Recipe)}.get(key.partition(".")[0])
    return first is not None and first.metadata.get(mark, False)


def measured_rewards(recipe) -> dict[str, float]:
    """Return the weights of the rewards that are measured, by name, sorted: those of
    `reward.weights`, and 0 for the others of the guard; then those of the user's own and of named
    servers, each followed by its weighted parts, NAME.PART.

    recipe: a `Recipe`, or a ConfigDict with the same keys.
    """
    prefix = "reward.weights."
    values = values_of(recipe)
    watched = dict.fromkeys(values["reward.panel"], 0.0)
    if values["reward.second_engine"]:
        watched[SECOND_READER] = 0.0
    weighted = {
        key.removeprefix(prefix): value
        for key, value in values.items()
        if key.startswith(prefix) and value is not None
    }
    measured: dict[str, float] = dict(sorted((watched | weighted).items()))
    weights = dict(pairs(values["reward.own_weights"], float))
    for name in own_names(values["reward.own"], as_tuples(values["reward.servers"])):
        measured[name] = weights.get(name, 0.0)
        measured |= {k: weight for k, weight in weights.items() if k.startswith(f"{name}.")}
    return measured


def main_reward(weights: Mapping[str, float]) -> str:
    """Return the name of the main reward: by its value runs are judged, and a video without it is
    masked. It is the first with a weight among the spelling, the CLIP rewards and the user's own; if
    there is none, the first of these that is measured; without any of these, the first measure of
    quality with a weight.

    weights: of the rewards that are measured.
    """
    others = [name for name in weights if name not in BUILT_IN]
    order = [name for name in ("ocr", "clip", "pickscore", *others) if name in weights]
    candidates = order or list(weights)
    return next((name for name in candidates if weights[name]), candidates[0])

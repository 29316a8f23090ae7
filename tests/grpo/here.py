"""Training in the test's own process, where runs alike share what is traced and compiled."""

import functools

import jax
import pytest

from grpo import train
from grpo.compare import Method
from grpo.compiled.functions import JITTED, Run
from wan_jax.inference import pipeline
from wan_jax.storage import model_dir

# of a recipe: what the programs follow from
SECTIONS = ("model", "lora", "sample", "train", "eval", "mesh")
UNRELATED = {"model": ("path", "offload"), "lora": ("init",), "eval": ("every", "seed", "previews")}
decoder = functools.cache(lambda vae: pipeline.decoder_programs(model_dir.abstract("vae", vae)[0]))
choose_mesh = train.devices.choose_mesh
runs: dict[str, Run] = {}


def shared_run(preset, recipe, mesh, *rest) -> Run:
    """Return a `Run` that has the jitted functions of an earlier one alike, and the decoder of any."""
    sections = {
        name: {k: v for k, v in recipe[name].to_dict().items() if k not in UNRELATED.get(name, ())}
        for name in SECTIONS
    }
    key = repr((preset, sections, mesh.devices.tolist(), dict(mesh.shape), rest))
    run = Run(preset, recipe, mesh, *rest)
    vars(run)["decoder"] = decoder(preset.vae)
    if (like := runs.setdefault(key, run)) is not run:
        vars(run).update({name: getattr(like, name) for name in JITTED})
    return run


def share(patch: pytest.MonkeyPatch, devices: int = 1) -> None:
    """Make `grpo.train` run on so many of the simulated devices, with shared programs."""
    patch.setattr(
        train.devices,
        "choose_mesh",
        functools.partial(choose_mesh, devices=jax.devices()[:devices]),
    )
    patch.setattr(train, "Run", shared_run)


def train_here(config, *overrides: str, devices: int = 1) -> int | None:
    """Train by the recipe in the file `config`; overrides: 'key=value'. Returns what
    `grpo.train.train` does, raises its `UserError`s.
    """
    with pytest.MonkeyPatch.context() as patch:
        share(patch, devices)
        return train.train_recipe(Method("recipe", str(config), overrides).config())

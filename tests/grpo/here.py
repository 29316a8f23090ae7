"""Training in the test's own process, where runs alike share what is traced and compiled."""

import dataclasses
import functools

import jax
import pytest

from grpo import setup, train
from grpo.compare import Method
from grpo.compiled import placement
from grpo.compiled.functions import JITTED, Functions
from grpo.run import RunSpec
from tests.grpo.tiny_run import MEASURES, PICTURE
from wan_jax.inference import pipeline
from wan_jax.storage import model_dir

# of a recipe: what the jitted functions follow from
SECTIONS = ("model", "lora", "sample", "train", "data", "eval", "mesh")
UNRELATED = {
    "model": ("path", "offload", "loras"),
    "lora": ("init",),
    "eval": ("every", "seed", "previews"),
    "data": ("path",),
}
decoder = functools.cache(lambda vae: pipeline.decoder_functions(model_dir.abstract("vae", vae)[0]))
choose_mesh = placement.choose_mesh
shared: dict[str, Functions] = {}


def shared_functions(spec: RunSpec, text_rows: int) -> Functions:
    """Return the run's `Functions`, with the jitted functions of an earlier one alike and the
    decoder of any.
    """
    sections = {
        name: {
            key: value
            for key, value in dataclasses.asdict(getattr(spec.recipe, name)).items()
            if key not in UNRELATED.get(name, ())
        }
        for name in SECTIONS
    }
    mesh = spec.mesh.devices.tolist(), dict(spec.mesh.shape)
    known = spec.preset, sections, mesh, spec.backend, spec.memory, text_rows, spec.data_shape
    key = repr(known)
    functions = Functions(spec, text_rows)
    vars(functions)["decoder"] = decoder(spec.preset.vae)
    like = shared.setdefault(key, functions)
    if like is not functions:
        vars(functions).update({name: getattr(like, name) for name in JITTED})
    return functions


def share(patch: pytest.MonkeyPatch, devices: int = 1) -> None:
    """Make `grpo.train` run on this many of the simulated devices, with shared functions."""

    def choose(*args, **kwargs):
        chosen = kwargs.pop("devices", None) or jax.devices()[:devices]
        return choose_mesh(*args, devices=chosen, **kwargs)

    patch.setattr(placement, "choose_mesh", choose)
    patch.setattr(setup, "Functions", shared_functions)


def train_here(config, *overrides: str, devices: int = 1) -> int | None:
    """Train by the recipe in the file `config`; overrides: 'key=value'. Returns what
    `grpo.train.train` does, raises its `UserError`s.
    """
    with pytest.MonkeyPatch.context() as patch:
        share(patch, devices)
        return train.train_recipe(Method("recipe", str(config), overrides).config())


def train_tiny(config, *overrides: str) -> int | None:
    """Train as `train_here`, with the rewards and the pictures of the tiny model's runs."""
    return train_here(config, *MEASURES, *PICTURE, *overrides)

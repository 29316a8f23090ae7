"""Training in the test's own process, where runs alike share what is traced and compiled."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest

from grpo import setup, train
from grpo.compare import Method
from grpo.compiled import placement
from grpo.compiled.functions import Functions
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
shared: dict[str, Any] = {}  # by what they are made of, written out


def shared_functions(spec: RunSpec, text_rows: int) -> Functions:
    """Return the run's `Functions` with jitted functions of earlier runs: the optimiser steps of one
    alike; the policy, the denoising steps and the decoder of any for which they are the same.
    """
    functions = Functions(spec, text_rows)
    sections = {
        name: {
            key: value
            for key, value in dataclasses.asdict(getattr(spec.recipe, name)).items()
            if key not in UNRELATED.get(name, ())
        }
        for name in SECTIONS
    }
    mesh = spec.mesh.devices.tolist(), dict(spec.mesh.shape)
    of_policy = (
        spec.preset,
        spec.settings.lora,
        spec.settings.dtype,
        spec.backend,
        spec.remat,
        spec.quantisation,
        spec.recipe.model.matmul_precision,
        mesh,
    )
    table = [repr(np.asarray(v).tolist()) for v in dataclasses.astuple(functions.table)]
    sample = spec.recipe.sample
    of_steps = spec.sampling_guidance, spec.method.keeps_mean, spec.method.sampling_kl
    of_steps += sample.reward_head, sample.reward_guidance
    of_solver = sections["eval"], spec.recipe.sample.shift, spec.recipe.sample.schedule
    made_of = {
        "policy": (),
        "steps": (table, of_steps),
        "eval_steps": of_solver,
        "unguided_steps": of_solver,
        "updates": (sections, spec.memory, text_rows, spec.data_shape),
    }
    for name, key in made_of.items():
        key = repr((name, of_policy, key))
        if key not in shared:
            shared[key] = getattr(functions, name)
        vars(functions)[name] = shared[key]
    vars(functions)["decoder"] = decoder(spec.preset.vae)
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

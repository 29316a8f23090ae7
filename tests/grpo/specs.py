"""Runs of published models, without weights."""

import functools
import types

import jax

from grpo.compiled.functions import Functions
from grpo.run import RunSpec
from grpo.settings import parse
from tests.grpo import tiny_run
from wan_jax.diffusion.experts import segments
from wan_jax.distributed import mesh as mesh_lib
from wan_jax.models import presets


@functools.cache
def devices_mesh(devices: int, fsdp: int = 1) -> jax.sharding.Mesh:
    """Return a mesh of the first simulated devices."""
    return mesh_lib.make_mesh(fsdp, devices=jax.devices()[:devices])


def spec_of(
    recipe, model: str, *, devices: int = 1, fsdp: int = 1, backend: str = "chunked", **values
) -> RunSpec:
    """Return the run of a recipe's module with a published model.

    values: {'section.key': value} of the recipe that differ.
    """
    config = recipe.get_config()
    config.update_from_flattened_dict(values)
    return spec_from(config, model, devices_mesh(devices, fsdp), backend)


def tiny_spec(model: str = "wan2.1-1.3b", **values) -> RunSpec:
    """Return the run of the tiny recipe, two groups of four, with a published model on one device."""
    config = tiny_run.config_of(tiny_run.recipe_text("model", "folder"), **values)
    return spec_from(config, model, devices_mesh(1), "xla")


def spec_from(config, model: str, mesh: jax.sharding.Mesh, backend: str) -> RunSpec:
    """Return the run of a ConfigDict with a published model."""
    recipe = parse.recipe_from_config(config)
    return RunSpec(recipe, parse.settings_of(recipe), presets.PRESETS[model], mesh, backend)


def functions_of(*args, **kwargs) -> Functions:
    """Return the jitted functions of `spec_of`'s run."""
    return Functions(spec_of(*args, **kwargs))


def levels_spec(schedule, quotas, videos, *, seed=0, boundary=None):
    """Return the part of a `RunSpec` that noise levels follow from."""
    return types.SimpleNamespace(
        recipe=types.SimpleNamespace(seed=seed, sample=types.SimpleNamespace(group_size=1)),
        settings=types.SimpleNamespace(videos=videos),
        preset=types.SimpleNamespace(boundary=boundary),
        windows=types.SimpleNamespace(quotas=quotas),
        segments=segments(schedule.timesteps, boundary),
        schedule=schedule,
    )

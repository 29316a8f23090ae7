"""What batches of data follow from, without a run."""

import types

from tests.grpo.specs import devices_mesh
from wan_jax.diffusion.experts import segments
from wan_jax.diffusion.schedule import flow_sigmas

ITEMS = 5  # of `data_folders.write_data`
SEED = 3


def spec_of(batch_size=3, micro=2, rollout_levels=True, boundary=None, steps=20):
    """Return the part of a `RunSpec` that a batch of data follows from."""
    schedule = flow_sigmas(steps, 3.0)
    return types.SimpleNamespace(
        recipe=types.SimpleNamespace(
            seed=SEED,
            data=types.SimpleNamespace(batch_size=batch_size),
            sample=types.SimpleNamespace(batch_size=micro),
        ),
        method=types.SimpleNamespace(rollout_levels=rollout_levels),
        preset=types.SimpleNamespace(boundary=boundary),
        segments=segments(schedule.timesteps, boundary),
        schedule=schedule,
        mesh=devices_mesh(1),
    )

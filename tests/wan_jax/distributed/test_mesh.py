"""The mesh: its axes, its default sizes, and what does not divide."""

import re

import jax
import pytest

from wan_jax.distributed import mesh as mesh_lib


def test_axes():
    mesh = mesh_lib.make_mesh(2, context=2)
    assert mesh_lib.describe(mesh) == "data 2 x fsdp 2 x context 2"
    assert mesh_lib.batch_shards(mesh) == 4
    # the devices of a context group are neighbours
    assert [device.id for device in mesh.devices[0, 0]] == [0, 1]
    mesh_lib.check_batch("batch", 8, mesh)
    one = mesh_lib.make_mesh(devices=jax.devices()[:1])
    assert mesh_lib.batch_shards(one) == 1


@pytest.mark.parametrize(
    "fsdp, context, setting",
    [
        (3, 1, "mesh.fsdp=3"),
        (0, 1, "mesh.fsdp=0"),
        (2, 3, "mesh.context=3"),
        (1, 16, "mesh.context=16"),
    ],
)
def test_sizes_that_do_not_divide_the_devices_are_named(fsdp, context, setting):
    with pytest.raises(ValueError, match=re.escape(setting)):
        mesh_lib.make_mesh(fsdp, context=context)


@pytest.mark.parametrize("batch", [0, 6])
def test_batches_that_do_not_divide_are_named(batch):
    with pytest.raises(ValueError, match=rf"batch={batch} .*\b4\b"):
        mesh_lib.check_batch("batch", batch, mesh_lib.make_mesh(2, context=2))


@pytest.mark.parametrize(
    "devices, batch, state, memory, given, chosen",
    [
        (8, 72, 30e9, 200e9, {}, (1, 1)),  # fits in half of a device: data parallel
        (8, 72, 340e9, 200e9, {}, (4, 1)),  # the fewest devices over which it does
        (4, 36, 340e9, 100e9, {}, (4, 1)),  # fits nowhere: all
        (8, 72, 340e9, 0, {}, (1, 1)),  # memory unknown
        (8, 2, 30e9, 200e9, {}, (1, 4)),
        (8, 6, 30e9, 200e9, {}, (1, 4)),
        (8, 2, 150e9, 200e9, {}, (2, 4)),
        (8, 9, 30e9, 200e9, {}, (1, 1)),  # check_batch refuses it
        (8, 72, 30e9, 200e9, {"context": 2}, (1, 2)),
        (8, 72, 340e9, 200e9, {"context": 4}, (2, 4)),
        (8, 72, 30e9, 200e9, {"fsdp": 8}, (8, 1)),
        (8, 4, 30e9, 200e9, {"fsdp": 8}, (8, 1)),
        (1, 1, 9e9, 1e9, {}, (1, 1)),
    ],
)
def test_the_chosen_sizes(devices, batch, state, memory, given, chosen):
    assert mesh_lib.choose(devices, batch, state, memory, **given) == chosen

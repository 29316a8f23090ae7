"""Where sampling computes."""

import dataclasses

import jax
import pytest

from wan_jax.errors import UserError
from wan_jax.inference import placement
from wan_jax.inference.placement import choose_placement, plan_decoding
from wan_jax.storage import model_dir


@pytest.fixture
def model(folders):
    return model_dir.open_model(folders[1])


@pytest.mark.parametrize(
    "videos, frames, devices, given, batch, mesh",
    [
        (1, 1, 1, 0, 1, (1, 1, 1)),
        (20, 1, 1, 0, 8, (1, 1, 1)),
        (20, 5, 1, 0, 1, (1, 1, 1)),
        (20, 5, 4, 0, 4, (4, 1, 1)),
        (5, 1, 4, 0, 8, (4, 1, 1)),  # three are repeated
        (2, 5, 4, 0, 2, (2, 1, 2)),  # two devices for each video
        (1, 5, 4, 0, 1, (1, 1, 4)),
        (20, 5, 4, 8, 8, (4, 1, 1)),
    ],
)
def test_batch_and_mesh(model, videos, frames, devices, given, batch, mesh):
    place = choose_placement(model, videos, frames, devices=devices, batch_size=given)
    assert place.batch_size == batch
    assert tuple(place.mesh.shape.values()) == mesh
    assert place.dtype == "float32" and place.precision == "default"  # on the CPU


def test_all_devices_by_default(model):
    assert choose_placement(model, 100, 5).mesh.size == len(jax.local_devices()) == 8


@pytest.mark.parametrize(
    "given, message", [(dict(devices=9), "devices=9"), (dict(batch_size=9), "batch_size=9")]
)
def test_impossible_placements(model, given, message):
    with pytest.raises((UserError, ValueError), match=message):
        choose_placement(model, 100, 5, **given)


def test_memory_decides_where_the_text_encoder_runs(model, monkeypatch):
    size = model_dir.component_bytes("text_encoder", model, "float32")
    device = jax.devices()[1]  # the CPU's first device stands for the CPU
    for limit, setting, there in (
        (size, "auto", False),
        (2 * size, "auto", True),
        (None, "auto", True),
        (size, "device", True),
        (2 * size, "cpu", False),
    ):
        found = placement._encoder_device(setting, model, "float32", device, limit)
        assert (found == device) == there


def test_memory_decides_how_videos_are_decoded(model):
    """Chunks that fit, and beside the transformers only where both fit."""
    place = choose_placement(model, 100, 5, devices=1)
    shape, large = (9, 8, 12, 16), (9, 400, 600, 16)
    assert plan_decoding(model, place, shape, 0, 10**15).beside  # no limit is known
    small = dataclasses.replace(place, limit=10**9)
    plan = plan_decoding(model, small, shape, 0, 10**6)
    assert plan.beside and plan.chunk == 0
    assert not plan_decoding(model, small, shape, 0, 10**9).beside
    plan = plan_decoding(model, small, large, 0, 10**6)
    assert not plan.beside and plan.chunk == 1
    assert plan_decoding(model, small, large, 8, 10**6).beside  # in tiles
    medium = dataclasses.replace(place, limit=16 * 10**9)
    assert 1 <= plan_decoding(model, medium, large, 0, 10**6).chunk < 9

"""Low-rank adapters: which layers get one, and from which random numbers."""

import jax
import numpy as np
import pytest
from flax import nnx

from wan_jax.models import lora
from wan_jax.models.layers import Linear, LoRAParam
from wan_jax.models.lora import LoRAConfig


def layers(rng: int = 0) -> nnx.Module:
    rngs = nnx.Rngs(rng)
    return nnx.Dict(to_q=Linear(6, 4, rngs=rngs), to_out_0=Linear(4, 6, rngs=rngs))


def adapters(model) -> dict:
    return dict(nnx.to_flat_state(nnx.state(model, LoRAParam)))


def test_only_targets_are_adapted_with_the_scale_of_peft():
    model = lora.attach(layers(), LoRAConfig(2, 6.0, ("to_out.0",)), jax.random.key(0))
    assert set(adapters(model)) == {("to_out_0", "lora_a"), ("to_out_0", "lora_b")}
    assert model["to_out_0"].lora_scale == 3.0 and model["to_q"].lora_scale == 0.0


def test_a_draw_depends_on_key_and_path_alone():
    def draw(seed, targets):
        model = lora.attach(layers(), LoRAConfig(2, 2.0, targets), jax.random.key(seed))
        return np.asarray(model["to_q"].lora_a[...])

    one = draw(0, ("to_q",))
    np.testing.assert_array_equal(draw(0, ("to_out.0", "to_q")), one)
    assert (draw(1, ("to_q",)) != one).all()


def test_adapted_layers():
    names = ["blocks/attn1/to_q", "blocks/attn1/to_out_0", "blocks/ffn/net_0/proj", "proj_out"]
    assert lora.adapted_layers(names, ["to_out.0"]) == {names[1]}
    assert lora.adapted_layers(names, ["ffn.net.0.proj", "to_q"]) == {names[0], names[2]}


@pytest.mark.parametrize(
    "config, value", [(LoRAConfig(rank=0), "rank 0"), (LoRAConfig(targets=("to_w",)), "to_w")]
)
def test_impossible_settings_are_named(config, value):
    with pytest.raises(ValueError, match=value):
        lora.attach(layers(), config, jax.random.key(0))

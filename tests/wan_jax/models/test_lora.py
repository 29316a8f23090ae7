"""Low-rank adapters: which layers get one, and from which random numbers."""

import zlib

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


def test_a_fresh_adapter_adds_nothing_and_its_first_factor_is_that_of_peft():
    """A ~ normal(1 / rank) by the key with the CRC-32 of the path folded in, B = 0, both fp32."""
    rngs, key, rank = nnx.Rngs(0), jax.random.key(3), 16
    block = nnx.Dict(
        attn1=nnx.Dict(to_q=Linear(512, 64, rngs=rngs)),
        attn2=nnx.Dict(to_q=Linear(512, 64, rngs=rngs, dtype=jax.numpy.bfloat16)),
    )
    x = jax.random.normal(jax.random.key(1), (2, 512))
    before = [np.asarray(block[name]["to_q"](x)) for name in block]
    model = lora.attach(block, LoRAConfig(rank, 8.0, ("to_q",)), key)
    for name, y in zip(model, before):
        layer, path = model[name]["to_q"], f"{name}/to_q"
        a, b = np.asarray(layer.lora_a[...]), np.asarray(layer.lora_b[...])
        assert a.dtype == b.dtype == np.float32 and not b.any()
        np.testing.assert_array_equal(layer(x), y)
        # 8192 draws: the relative standard error of their deviation is 0.8 %
        assert a.std() * rank == pytest.approx(1, rel=0.05) and abs(a.mean()) * rank < 0.05
        of_layer = jax.random.fold_in(key, zlib.crc32(path.encode()))
        np.testing.assert_array_equal(a, jax.random.normal(of_layer, a.shape) / rank)


def test_adapted_layers():
    names = ["blocks/attn1/to_q", "blocks/attn1/to_out_0", "blocks/ffn/net_0/proj", "proj_out"]
    assert lora.adapted_layers(names, ["to_out.0"]) == {names[1]}
    assert lora.adapted_layers(names, ["ffn.net.0.proj", "to_q"]) == {names[0], names[2]}
    assert not lora.adapted_layers(names, ["o_q", "roj_out"])  # no whole words


@pytest.mark.parametrize(
    "config, value",
    [
        (LoRAConfig(rank=0), "rank 0"),
        (LoRAConfig(targets=("to_w",)), "to_w"),
        (LoRAConfig(targets=("to_q/x",)), "to_q/x"),
    ],
)
def test_impossible_settings_are_named(config, value):
    with pytest.raises(ValueError, match=value):
        lora.attach(layers(), config, jax.random.key(0))

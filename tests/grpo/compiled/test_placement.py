"""On several devices: results of rollout and update, where arrays lie, what is sent, which mesh is
chosen.
"""

import dataclasses
import math
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from configs import wan21_1_3b_ocr
from configs.defaults import defaults
from grpo.compiled import offload, placement
from grpo.learning import optimiser as optimiser_step
from grpo.learning import train_state
from grpo.learning.optimiser import OptimiserConfig, make_update, state_shapes
from grpo.learning.policy import make_structure
from grpo.learning.policy_gradient import PolicyBatch, make_gradient, stack_batches
from grpo.learning.policy_loss import LossConfig
from grpo.settings import parse
from grpo.settings.budget import Spent
from tests.grpo.specs import devices_mesh
from tests.grpo.tiny_policy import (
    CONFIG,
    LORA,
    OPTIMISER,
    TABLE,
    copies,
    flat_vector,
    sampled,
    setup,
    text_batch,
)
from wan_jax.diffusion.guidance import TextBatch
from wan_jax.distributed import mesh as mesh_lib
from wan_jax.distributed import sharding as sharding_lib
from wan_jax.models import presets
from wan_jax.storage.checkpoint import Checkpoints

# fsdp splits its feed-forward
WIDE = dataclasses.replace(CONFIG, num_attention_heads=4, ffn_dim=768)
ODD = (3, 2, 6, 4)  # 9 tokens: no multiple of 2


def two_updates(lora, mesh, offloaded=False):
    """((final latents, log-probs, weights, average, norms), state) after a rollout and two updates
    on the mesh.

    The new state lies where the old one did, so that the next update is the same program.
    """
    policy, trainable, frozen = setup(lora, mesh, config=WIDE)
    final, kept = sampled(
        policy,
        trainable,
        frozen,
        range(8),
        guidance=3.0,
        text=text_batch(8, mesh),
        mesh=mesh,
        shape=ODD,
    )
    assert len(final.sharding.device_set) == mesh.size
    # a large eps, so that a gradient near 0, whose sign is rounding, makes no difference
    optimiser = dataclasses.replace(OPTIMISER, adam_eps=1e-3)
    module = offload if offloaded else optimiser_step
    loss = LossConfig(kl_beta=0.0 if lora else 0.01)
    gradient = make_gradient(policy, TABLE, 3.0, loss)
    update = module.make_update(gradient, policy, optimiser, mesh)
    placed = {k: v.sharding for k, v in trainable.items()}
    state = module.init_state(copies(trainable), optimiser)
    batch = stack_batches([kept], np.linspace(-2, 2, 8)[None], np.ones((1, 8), bool))
    state, metrics, _ = update(state, frozen, batch)
    assert metrics.averages()["ratio_max"] - 1 < 1e-5
    state, _, norms = update(state, frozen, batch)
    for tree in (
        state.trainable,
        *(() if offloaded else (state.ema, state.opt[1][0].mu, state.opt[1][0].nu)),
    ):
        assert not [
            k for k, v in tree.items() if not v.sharding.is_equivalent_to(placed[k], v.ndim)
        ]
    assert getattr(update, "gradient", update)._cache_size() == 1
    return (
        np.asarray(final),
        np.asarray(kept.log_prob),
        flat_vector(state.trainable),
        flat_vector(state.ema),
        np.array([float(v) for v in norms.values()]),
    ), state


@pytest.mark.slow
def test_eight_devices_equal_one_with_adapters():
    """Data parallel; and data 2 x fsdp 2 x context 2, 9 tokens over the two of a context."""
    assert jax.device_count() == 8
    one, _ = two_updates(LORA, devices_mesh(1))
    for mesh in (mesh_lib.make_mesh(), mesh_lib.make_mesh(2, context=2)):
        for many, alone in zip(two_updates(LORA, mesh)[0], one):
            np.testing.assert_allclose(many, alone, atol=1e-4)


@pytest.mark.slow
def test_eight_devices_equal_one_with_all_weights(tmp_path):
    """With a KL. Also with moments and average on the host, which a checkpoint brings back there."""
    one, _ = two_updates(None, devices_mesh(1))
    mesh = mesh_lib.make_mesh(2, context=2)
    plain, before = two_updates(None, mesh)
    assert any(not v.sharding.is_fully_replicated for v in before.trainable.values())
    offloaded, state = two_updates(None, mesh, offloaded=True)
    for many, alone, hosted in zip(plain, one, offloaded):
        np.testing.assert_allclose(many, alone, atol=1e-4)
        np.testing.assert_allclose(hosted, many, atol=1e-6)
    checkpoints = Checkpoints(tmp_path)
    train_state.save(
        checkpoints, 1, {"transformer": state}, defaults().to_dict(), None, Spent(5, 1.5)
    )
    assert train_state.spent_by(checkpoints, 1) == Spent(5, 1.5)
    restored = train_state.restore(checkpoints, 1, {"transformer": state})["transformer"]
    other_way = train_state.restore(checkpoints, 1, {"transformer": before})["transformer"]
    for got, like in ((restored, state), (other_way, before)):
        jax.tree.map(np.testing.assert_array_equal, got, state)
        same = jax.tree.map(
            lambda a, b: (
                a.sharding.is_equivalent_to(b.sharding, a.ndim)
                and a.sharding.memory_kind == b.sharding.memory_kind
            ),
            got,
            like,
        )
        assert all(jax.tree.leaves(same))
    kinds = [
        {x.sharding.memory_kind for x in tree.values()}
        for tree in (state.opt[1][0].mu, state.opt[1][0].nu, state.ema, state.trainable)
    ]
    assert kinds == [{"pinned_host"}] * 3 + [{"device"}]


def test_no_memory_to_offload_to_is_an_error():
    device = types.SimpleNamespace(platform="toaster", addressable_memories=list)
    with pytest.raises(
        ValueError, match=r"offload_optimiser=True needs memory of kind pinned_host, toaster.*fsdp"
    ):
        offload.check_device(device)


def abstract(tree, mesh):
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        tree,
        sharding_lib.param_shardings(tree, mesh),
    )


def sent(text: str) -> dict[str, list[int]]:
    """The elements of every collective's largest result, by kind, in optimised HLO of fp32."""

    def elements(result):
        return max(
            math.prod(int(n) for n in dims.split(",") if n)
            for dims in re.findall(r"f32\[([\d,]*)\]", result)
        )

    return {
        kind: sorted(map(elements, re.findall(rf"= (.*?) {kind}(?:-start)?\(", text)))
        for kind in (
            "all-gather",
            "reduce-scatter",
            "all-reduce",
            "all-to-all",
            "collective-permute",
        )
    }


@pytest.mark.slow
def test_weights_are_gathered_block_by_block_and_gradients_scattered(capfd):
    """What the update of all weights sends over fsdp=4, read from the compiled program."""
    mesh, b = mesh_lib.make_mesh(4, jax.devices()[:4]), 4
    config = dataclasses.replace(CONFIG, num_attention_heads=4, attention_head_dim=64, ffn_dim=768)
    policy = make_structure(
        config, lora=None, dtype=jnp.float32, attention="xla", remat="none", mesh=mesh
    )
    rows = sharding_lib.batch_sharding(mesh, 2)
    log_prob = jax.ShapeDtypeStruct((1, 2, b), jnp.float32, sharding=rows)
    text = TextBatch(
        *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, b, 6, 12), (1, 6, 12))), 10
    )
    batch = PolicyBatch(
        jax.ShapeDtypeStruct((1, 4, b, *ODD), jnp.float32, sharding=rows),
        log_prob,
        jax.ShapeDtypeStruct((1, 2), jnp.int32),
        None,
        text,
        jax.ShapeDtypeStruct((1, b), jnp.float32),
        jax.ShapeDtypeStruct((1, b), bool),
    )
    gradient = make_gradient(policy, TABLE, 1.0, LossConfig(kl_beta=0.0))
    update = make_update(gradient, policy, OPTIMISER, mesh)
    found = sent(
        update.lower(
            abstract(state_shapes(policy, OPTIMISER), mesh), abstract(policy.base, mesh), batch
        )
        .compile()
        .as_text()
    )

    split = {
        path: x.size
        for path, x in policy.trainable.items()
        if sharding_lib.param_spec(x.shape, 4) != P()
    }
    of_one_block = [
        size // config.num_layers for path, size in split.items() if path.startswith("blocks/")
    ]
    outside = [size for path, size in split.items() if not path.startswith("blocks/")]
    # 8 kernels of attention, 2 of the feed-forward
    assert len(of_one_block) == 10 and len(outside) == 3
    # those of a block again for the backward pass
    assert found["all-gather"] == sorted(2 * of_one_block + outside)
    assert found["reduce-scatter"] == sorted(size // 4 for size in of_one_block + outside)
    assert found["all-reduce"][-1] < 2**16  # what is not split
    assert not found["all-to-all"] and not found["collective-permute"]
    assert "rematerialization" not in capfd.readouterr().err


def test_axes_of_the_mesh():
    mesh = mesh_lib.make_mesh(2, context=2)
    assert mesh_lib.describe(mesh) == "data 2 x fsdp 2 x context 2"
    for shape, shard in (
        ((2, 256, 512), (2, 128, 512)),
        ((2, 32, 2048), (2, 32, 1024)),
        ((40, 5120), (40, 2560)),
        ((512,), (512,)),
    ):
        assert (
            sharding_lib.shard_params({"": jnp.zeros(shape)}, mesh)[""].sharding.shard_shape(shape)
            == shard
        )
    assert sharding_lib.batch_sharding(mesh, 1).shard_shape((3, 8, 5)) == (3, 2, 5)
    mesh_lib.check_batch("batch", 4, mesh)


@pytest.mark.parametrize(
    "fsdp, context, why",
    [
        (3, 1, r"mesh.fsdp=3 does not divide the 8 devices; choose a divisor of 8"),
        (0, 1, r"mesh.fsdp=0 does not divide"),
        (2, 3, r"mesh.context=3 does not divide the 8 devices / fsdp=2 = 4; choose a divisor of 4"),
        (1, 16, r"mesh.context=16 does not divide the 8 devices; choose"),
        (
            2,
            2,
            r"batch=6 does not divide over 4 devices \(mesh data 2 x fsdp 2 x context 2\); make it a multiple of 4",
        ),
    ],
)
def test_what_does_not_divide_is_refused(fsdp, context, why):
    with pytest.raises(ValueError, match=why):
        mesh_lib.check_batch("batch", 6, mesh_lib.make_mesh(fsdp, context=context))


# bytes a parameter; MI300X, H200 at JAX's default fraction
@pytest.mark.parametrize(
    "model, rank, expected",
    [
        ("wan2.1-1.3b", 0, ("data 4", "data 4")),
        ("wan2.1-14b", 32, ("data 4", "data 4")),
        ("wan2.1-14b", 0, ("data 1 x fsdp 4", "data 1 x fsdp 4")),
    ],
)
def test_published_models_over_four_devices(model, rank, expected):
    config = wan21_1_3b_ocr.get_config()
    config.update_from_flattened_dict({"lora.rank": rank, "sample.batch_size": 36})
    config.sample.groups = 36
    recipe = parse.recipe_from_config(config)
    settings, devices = parse.settings_of(recipe), jax.devices()[:4]
    assert settings.method.needs_reference
    for memory, mesh in zip((196e9, 105e9), expected):
        _, line = placement.choose_mesh(
            recipe,
            settings,
            presets.PRESETS[model],
            trained=1,
            devices=devices,
            memory=memory,
        )
        assert f"mesh {mesh} x" in line and f" of {memory / 1e9:.0f} GB a device" in line


def test_bytes_that_a_run_holds():
    policy = make_structure(WIDE, lora=None, dtype=jnp.float32, attention="xla", remat="none")
    count = sum(x.size for x in policy.trainable.values())

    def per_parameter(
        experts=1,
        trained=1,
        reference=False,
        offload="auto",
        offload_optimiser=False,
        lagged=0,
        **optimiser,
    ):
        return (
            placement.state_bytes(
                policy,
                experts=experts,
                trained=trained,
                reference=reference,
                offload=offload,
                offload_optimiser=offload_optimiser,
                lagged=lagged,
                optimiser=OptimiserConfig(**optimiser),
            )
            / count
        )

    # a copy in the model's type, weight with moments and average, gradient
    assert per_parameter() == 4 + 16 + 4
    assert per_parameter(reference=True) == 4 + 4 + 16 + 4
    assert per_parameter(offload_optimiser=True) == 4 + 4 + 4
    assert per_parameter(moments_dtype="bfloat16") == 4 + 12 + 4
    assert per_parameter(moments_dtype="bfloat16", ema_decay=0.0) == 4 + 8 + 4
    assert per_parameter(lagged=1) == 4 + 16 + 4 + 4
    assert per_parameter(2, 2, lagged=2) == 4 + 2 * (16 + 2 * 4) + 4
    assert per_parameter(trained=0) == 4  # an evaluation
    assert per_parameter(2, 2, reference=True) == 4 + 4 + 2 * 16 + 4
    assert per_parameter(2, 1, reference=True, offload="never") == 2 * 4 + 4 + 16 + 4


def test_what_is_recomputed_follows_the_memory():
    """1.3B, 8 pictures of 512x512: 9 x 1536 + 8960 values of 30 layers for 1,024 tokens, twice with
    guidance.
    """
    preset = presets.PRESETS["wan2.1-1.3b"]
    kept = 2 * 8 * 1024 * 30 * (9 * 1536 + 8960) * 2

    def parsed(**values):
        config = wan21_1_3b_ocr.get_config()
        size = {"sample.frames": 1, "sample.height": 512, "sample.width": 512}
        config.update_from_flattened_dict(size | {"sample.batch_size": 8} | values)
        recipe = parse.recipe_from_config(config)
        return recipe, parse.settings_of(recipe)

    def state_of(**values):
        return placement.state_of(*parsed(**values), preset, 1)

    def chosen(memory, **values):
        return placement.choose_remat(
            *parsed(**values),
            preset,
            devices_mesh(1),
            tokens=1024,
            trained=1,
            memory=memory,
        )

    def least(kept, state):
        return (kept + state) / placement.SHARE

    state = state_of()
    eight, four = (state - state_of(**{"model.weights": name}) for name in ("fp8", "nf4"))
    assert 1.2e9 < eight < four < 2.1e9  # of 2.8e9 in 16 bits
    assert chosen(None) == "block"
    assert chosen(least(kept, state) + 1e6) == "save_matmuls"
    assert chosen(least(kept, state) - 1e6) == "block"
    nft = {"train.method": "nft"}  # without guidance, but with the old weights
    more = state_of(**nft)
    assert more > state and chosen(least(kept / 2, more) + 1e6, **nft) == "save_matmuls"
    guided = nft | {"train.guided": True}
    assert chosen(least(kept, state) + 1e6, **guided) == "block"
    assert chosen(least(kept, more) + 1e6, **guided) == "save_matmuls"
    unguided = {"sample.guidance": 1.0}
    assert chosen(least(kept, state) - 1e6, **unguided) == "save_matmuls"
    assert chosen(least(kept / 2, state) - 1e6, **unguided) == "block"
    for memory in (None, 1.0):
        assert chosen(memory, **{"model.remat": "none"}) == "none"

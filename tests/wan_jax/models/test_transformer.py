"""The Wan transformer against Diffusers (live and recorded), and its own properties."""

import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from wan_jax.models import flat_params, lora
from wan_jax.models.config import TransformerConfig, from_dict
from wan_jax.models.layers import LoRAParam
from wan_jax.models.transformer import REMAT_POLICIES, WanTransformer3D
from wan_jax.storage import key_table

GOLDEN = pathlib.Path(__file__).parents[2] / "golden"
spec = importlib.util.spec_from_file_location("make_transformer", GOLDEN / "make_transformer.py")
maker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(maker)
GRIDS = {"picture": (1, 6, 8), "clip": (3, 4, 6)}


def abstract(config: TransformerConfig, **kwargs):
    kwargs = {"dtype": jnp.float32} | kwargs
    return nnx.split(nnx.eval_shape(lambda: WanTransformer3D(config, rngs=nnx.Rngs(0), **kwargs)))


def build(settings: dict, weights: dict, **kwargs) -> WanTransformer3D:
    graphdef, state = abstract(from_dict(TransformerConfig, settings), **kwargs)
    like = flat_params.flatten(state)
    flat = key_table.to_ours("transformer", weights, {k: v.shape for k, v in like.items()})
    return nnx.merge(
        graphdef,
        flat_params.unflatten(state, {k: jnp.asarray(v, like[k].dtype) for k, v in flat.items()}),
    )


def golden_model(**kwargs) -> WanTransformer3D:
    _, state = abstract(from_dict(TransformerConfig, maker.CONFIG))
    ours = {k: v.shape for k, v in flat_params.flatten(state).items()}
    shapes = {e.key: e.shape for e in key_table.entries("transformer", ours)}
    return build(maker.CONFIG, maker.random_weights(shapes, maker.SEED), **kwargs)


@nnx.jit(static_argnames=("text_padding",))
def run(model, latents, timesteps, text, text_padding=0):
    return model(latents, timesteps, text, text_padding=text_padding)


def relative_error(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize("name", GRIDS)
def test_recorded_velocities(name):
    with np.load(GOLDEN / "transformer.npz") as recorded:
        assert json.loads(str(recorded["config"])) == {**maker.CONFIG, "patch_size": [1, 2, 2]}
        out = run(golden_model(), *maker.random_inputs(maker.SEED, *GRIDS[name]))
        assert relative_error(out, recorded[name]) < 1e-5


def products(jaxpr) -> int:
    """Matrix products in a jaxpr and all inside it; a scan's body counts once."""
    count = sum(e.primitive.name == "dot_general" for e in jaxpr.eqns)
    inner = jax.tree.leaves(
        [list(e.params.values()) for e in jaxpr.eqns],
        is_leaf=lambda x: hasattr(x, "jaxpr") or hasattr(x, "eqns"),
    )
    return count + sum(
        products(getattr(x, "jaxpr", x)) for x in inner if hasattr(x, "jaxpr") or hasattr(x, "eqns")
    )


@pytest.mark.slow
def test_rematerialisation_changes_memory_and_work_but_not_gradients():
    inputs = maker.random_inputs(maker.SEED, *next(iter(GRIDS.values())))
    gradients, work, kept = {}, {}, {}
    for remat in REMAT_POLICIES:
        graphdef, state = nnx.split(golden_model(remat=remat))

        def loss(state):
            return jnp.mean(nnx.merge(graphdef, state)(*inputs) ** 2)  # noqa: B023

        gradients[remat] = flat_params.flatten(jax.jit(jax.grad(loss))(state))
        work[remat] = products(jax.make_jaxpr(jax.grad(loss))(state).jaxpr)
        residuals = jax.eval_shape(lambda state: jax.vjp(loss, state)[1], state)
        kept[remat] = sum(np.prod(x.shape) for x in jax.tree.leaves(residuals))
    for remat in ("block", "save_matmuls", "offload"):
        for path, g in gradients["none"].items():
            assert relative_error(gradients[remat][path], g) < 1e-5, (remat, path)
    assert work["none"] < work["save_matmuls"] < work["block"] == work["offload"]
    assert kept["none"] > kept["save_matmuls"] > kept["block"] == kept["offload"]


@pytest.mark.quick_cases(1)
@pytest.mark.parity
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention_head_dim": 128, "num_attention_heads": 3, "num_layers": 1},
        {"in_channels": 48, "out_channels": 48, "ffn_dim": 96},
    ],
)
@pytest.mark.parametrize("grid", [(1, 4, 6), (4, 6, 4)])
def test_diffusers(changes, grid):
    config = maker.CONFIG | changes
    model, weights = maker.peer(config, seed=5)
    inputs = maker.random_inputs(3, *grid, channels=config["in_channels"])
    assert relative_error(run(build(config, weights), *inputs), maker.run(model, *inputs)) < 1e-5


@pytest.mark.slow
@pytest.mark.parity
def test_bfloat16_is_as_close_to_float32_as_diffusers_is(tmp_path):
    """bf16 rounds every product and the residual stream; two implementations that round in a
    different order differ by about what each differs from fp32. So: ours must be no further from
    fp32 than 1.3 times the peer's own distance.
    """
    import diffusers
    import torch

    config = maker.CONFIG | {"num_layers": 6}
    model, weights = maker.peer(config, seed=6)
    model.save_pretrained(tmp_path)
    half = diffusers.WanTransformer3DModel.from_pretrained(
        tmp_path, torch_dtype=torch.bfloat16
    ).eval()
    latents, timesteps, text = maker.random_inputs(4, 2, 6, 8)
    exact = maker.run(model, latents, timesteps, text)
    with torch.no_grad():
        theirs = (
            half(
                torch.from_numpy(latents.transpose(0, 4, 1, 2, 3)).bfloat16(),
                torch.from_numpy(timesteps),
                torch.from_numpy(text).bfloat16(),
            )
            .sample.float()
            .numpy()
            .transpose(0, 2, 3, 4, 1)
        )
    ours = run(build(config, weights, dtype=jnp.bfloat16), latents, timesteps, text)
    assert relative_error(ours, exact) < 1.3 * relative_error(theirs, exact) < 0.05


def test_precision_policy():
    _, state = abstract(from_dict(TransformerConfig, maker.CONFIG), dtype=jnp.bfloat16)
    kept = {k for k, v in flat_params.flatten(state).items() if v.dtype == jnp.float32}
    assert kept == {
        "scale_shift_table",
        "blocks/scale_shift_table",
        "blocks/norm2/scale",
        "blocks/norm2/bias",
    } | {
        f"condition_embedder/time_embedder/linear_{i}/{leaf}"
        for i in (1, 2)
        for leaf in ("kernel", "bias")
    }


def test_counted_padding_equals_zero_rows():
    latents, timesteps, text = maker.random_inputs(1, 2, 4, 6)
    text[:, 7:] = 0
    model = golden_model()
    whole = run(model, latents, timesteps, text)
    assert relative_error(run(model, latents, timesteps, text[:, :7], text_padding=5), whole) < 2e-6
    # the padding is attended to
    assert relative_error(run(model, latents, timesteps, text[:, :7]), whole) > 1e-3


def test_samples_of_a_batch_are_independent():
    latents, timesteps, text = maker.random_inputs(2, 1, 4, 4)
    model = golden_model()
    both = run(model, latents, timesteps, text)
    assert relative_error(run(model, latents[1:], timesteps[1:], text[1:]), both[1:]) < 2e-6


def with_adapters(model, targets=lora.ATTENTION_TARGETS, seed=0):
    return lora.attach(
        model, lora.LoRAConfig(rank=4, alpha=8.0, targets=targets), jax.random.key(seed)
    )


@pytest.mark.slow
def test_fresh_adapters_change_nothing_and_trained_ones_act_as_merged_weights():
    inputs = maker.random_inputs(2, 1, 4, 4)
    base = run(golden_model(), *inputs)
    model = with_adapters(golden_model(), ("to_q", "to_out.0", "ffn.net.0.proj"))
    # float32: x + 0 is exact, but another function is compiled
    assert relative_error(run(model, *inputs), base) < 1e-6
    graphdef, adapters, rest = nnx.split(model, LoRAParam, ...)
    flat = {
        k: v + 0.1 * jax.random.normal(jax.random.key(i), v.shape)
        for i, (k, v) in enumerate(flat_params.flatten(adapters).items())
    }
    adapted = run(nnx.merge(graphdef, flat_params.unflatten(adapters, flat), rest), *inputs)
    assert relative_error(adapted, base) > 1e-2

    graphdef, state = nnx.split(golden_model())
    merged = dict(flat_params.flatten(state))
    for path in flat:
        if path.endswith("lora_a"):
            layer = path.removesuffix("/lora_a")
            # alpha / rank = 2
            merged[f"{layer}/kernel"] += 2.0 * flat[path] @ flat[f"{layer}/lora_b"]
    assert (
        relative_error(
            run(nnx.merge(graphdef, flat_params.unflatten(state, merged)), *inputs), adapted
        )
        < 1e-5
    )


def test_adapter_targets():
    paths = flat_params.flatten(nnx.split(with_adapters(golden_model()), LoRAParam, ...)[1])
    assert {p.rsplit("/", 1)[0] for p in paths} == {
        f"blocks/attn{i}/{name}" for i in (1, 2) for name in ("to_q", "to_k", "to_v", "to_out_0")
    }
    assert paths["blocks/attn1/to_q/lora_a"].shape == (3, 48, 4)
    same, other = (
        flat_params.flatten(nnx.split(with_adapters(golden_model(), seed=s), LoRAParam, ...)[1])
        for s in (0, 1)
    )
    np.testing.assert_array_equal(
        same["blocks/attn2/to_v/lora_a"], paths["blocks/attn2/to_v/lora_a"]
    )
    assert (
        relative_error(other["blocks/attn2/to_v/lora_a"], paths["blocks/attn2/to_v/lora_a"]) > 0.5
    )
    with pytest.raises(ValueError, match="to_w"):
        with_adapters(golden_model(), ("to_q", "to_w"))

"""wan_jax/models/text_encoder.py against transformers (live and recorded), and the properties it
promises.
"""

import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from wan_jax.models import flat_params
from wan_jax.models.config import TextEncoderConfig, from_dict
from wan_jax.models.text_encoder import UMT5Encoder, encode, relative_buckets
from wan_jax.storage import key_table

GOLDEN = pathlib.Path(__file__).parents[2] / "golden"


def load_golden_maker():
    spec = importlib.util.spec_from_file_location(
        "make_text_encoder", GOLDEN / "make_text_encoder.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


golden = load_golden_maker()


def shapes_of(config: TextEncoderConfig) -> dict:
    model = nnx.eval_shape(lambda: UMT5Encoder(config, rngs=nnx.Rngs(0)))
    return {path: leaf.shape for path, leaf in flat_params.flatten(nnx.state(model)).items()}


def with_weights(config: TextEncoderConfig, tensors: dict) -> UMT5Encoder:
    """The encoder with the tensors of a UMT5 state dict (numpy)."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: UMT5Encoder(config, rngs=nnx.Rngs(0))))
    ours = key_table.to_ours("text_encoder", tensors, shapes_of(config))
    return nnx.merge(
        graphdef, flat_params.unflatten(state, {k: jnp.asarray(v) for k, v in ours.items()})
    )


def random_model(config: TextEncoderConfig, seed: int = 3) -> UMT5Encoder:
    table = key_table.entries("text_encoder", shapes_of(config))
    return with_weights(config, golden.random_weights({e.key: e.shape for e in table}, seed))


def relative_error(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


run = nnx.jit(lambda model, ids, mask: model(ids, mask))
run_encode = nnx.jit(encode)
SMALL = from_dict(TextEncoderConfig, golden.CONFIG)


# --- against transformers -------------------------------------------------------------------------


def test_recorded_hidden_states():
    file = np.load(GOLDEN / "text_encoder.npz")
    assert (GOLDEN / "text_encoder.npz").stat().st_size < 200_000
    config = from_dict(TextEncoderConfig, json.loads(str(file["config"])))
    model = random_model(config, int(file["seed"]))
    out = np.asarray(run_encode(model, file["ids"], file["mask"]))
    for row, length in enumerate(file["mask"].sum(axis=1)):
        assert relative_error(out[row, :length], file["hidden"][row, :length]) <= 1e-5, f"row {row}"
    assert not out[file["mask"] == 0].any()


@pytest.mark.parity
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "relative_attention_num_buckets": 16,
            "relative_attention_max_distance": 40,
            "layer_norm_epsilon": 0.1,
            "num_layers": 2,
            "d_kv": 4,
        },
    ],
)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_transformers(changes, attention):
    import torch
    import transformers

    values = {**golden.CONFIG, **changes}
    theirs_config = transformers.UMT5Config(**values, dropout_rate=0.0)
    try:
        theirs_config._attn_implementation = attention
        theirs = transformers.UMT5EncoderModel(theirs_config).eval()
    except ValueError as error:  # transformers 4 has one implementation
        pytest.skip(str(error))
    state = theirs.state_dict()
    weights = golden.random_weights({k: tuple(v.shape) for k, v in state.items()}, seed=5)
    weights["encoder.embed_tokens.weight"] = weights["shared.weight"]
    theirs.load_state_dict({k: torch.from_numpy(v) for k, v in weights.items()})
    ids, mask = golden.random_ids(values["vocab_size"], (200, 57, 1), seed=6)
    with torch.no_grad():
        want = theirs(
            torch.from_numpy(ids).long(), torch.from_numpy(mask)
        ).last_hidden_state.numpy()

    got = np.asarray(run(with_weights(from_dict(TextEncoderConfig, values), weights), ids, mask))
    errors = [relative_error(got[row, :n], want[row, :n]) for row, n in enumerate(mask.sum(axis=1))]
    print("relative errors", errors)
    assert max(errors) <= 1e-5


@pytest.mark.parity
@pytest.mark.parametrize("num_buckets,max_distance", [(32, 128), (16, 40), (8, 20), (64, 512)])
def test_buckets_of_transformers(num_buckets, max_distance):
    import torch
    import transformers
    from transformers.models.umt5.modeling_umt5 import UMT5Attention

    config = transformers.UMT5Config(
        d_model=8,
        d_kv=4,
        num_heads=2,
        relative_attention_num_buckets=num_buckets,
        relative_attention_max_distance=max_distance,
    )
    position = torch.arange(600)
    want = UMT5Attention(config, has_relative_attention_bias=True)._relative_position_bucket(
        position[None, :] - position[:, None]
    )
    np.testing.assert_array_equal(relative_buckets(600, num_buckets, max_distance), want.numpy())


# --- parameters -----------------------------------------------------------------------------------


def test_parameters_of_the_published_encoder():
    shapes = shapes_of(TextEncoderConfig())
    assert shapes["encoder/block/layer_0/SelfAttention/relative_attention_bias/embedding"] == (
        24,
        32,
        64,
    )
    assert shapes["encoder/block/layer_1/DenseReluDense/wi_1/kernel"] == (24, 4096, 10240)
    assert sum(int(np.prod(s)) for s in shapes.values()) == 5_680_910_336
    keys = {entry.key for entry in key_table.entries("text_encoder", shapes)}
    assert len(keys) == 242
    layer = "encoder.block.23.layer"
    assert keys >= {
        "shared.weight",
        "encoder.final_layer_norm.weight",
        f"{layer}.0.SelfAttention.o.weight",
        f"{layer}.0.SelfAttention.relative_attention_bias.weight",
        f"{layer}.0.layer_norm.weight",
        f"{layer}.1.DenseReluDense.wi_0.weight",
        f"{layer}.1.layer_norm.weight",
    }


@pytest.mark.slow
def test_initialisation_is_t5s_and_layers_differ():
    config = from_dict(
        TextEncoderConfig, {**golden.CONFIG, "d_model": 128, "d_kv": 64, "d_ff": 320}
    )
    flat = flat_params.flatten(nnx.state(UMT5Encoder(config, rngs=nnx.Rngs(0))))
    attention, dense = "encoder/block/layer_0/SelfAttention", "encoder/block/layer_1/DenseReluDense"
    wanted = {
        "shared/embedding": 1.0,
        f"{attention}/q/kernel": (128 * 64) ** -0.5,
        f"{attention}/k/kernel": 128**-0.5,
        f"{attention}/o/kernel": (4 * 64) ** -0.5,
        f"{dense}/wi_0/kernel": 128**-0.5,
        f"{dense}/wo/kernel": 320**-0.5,
        f"{attention}/relative_attention_bias/embedding": 128**-0.5,
    }
    for path, std in wanted.items():
        assert float(jnp.std(flat[path])) == pytest.approx(std, rel=0.1), path
        if "block" in path:
            assert relative_error(flat[path][0], flat[path][1]) > 1, (
                f"{path}: layers were initialised alike"
            )


# --- properties -----------------------------------------------------------------------------------


def test_bucket_table():
    table = relative_buckets(512, 32, 128)
    assert table.shape == (512, 512) and table.dtype == np.int32
    left, right = table[:, 0], table[0]  # key n to the left of the query; key n to its right
    starts = [int(np.argmax(left == bucket)) for bucket in range(16)]
    assert starts == [0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91]
    assert left[0] == 0 and (right[1:] == left[1:] + 16).all()
    assert left[-1] == 15 and right[-1] == 31
    assert (table[:300, :300] == table[200:500, 200:500]).all()  # depends on the distance only


def test_valid_rows_do_not_depend_on_the_padding():
    model = random_model(SMALL)
    ids, mask = golden.random_ids(SMALL.vocab_size, (40, 17), seed=1)
    short = np.asarray(run(model, ids, mask))
    pad = ((0, 0), (0, 88))
    padded = np.asarray(run(model, np.pad(ids, pad, constant_values=7), np.pad(mask, pad)))
    for row, length in enumerate((40, 17)):
        assert relative_error(padded[row, :length], short[row, :length]) <= 1e-6


def test_rows_depend_on_every_token_and_on_its_position():
    model = random_model(SMALL)
    ids, mask = golden.random_ids(SMALL.vocab_size, (40,), seed=1)
    base = np.asarray(run(model, ids, mask))
    other, swapped = ids.copy(), ids.copy()
    other[0, 39] = 5 if ids[0, 39] != 5 else 6
    swapped[0, [3, 9]] = ids[0, [9, 3]]
    assert ids[0, 3] != ids[0, 9]
    assert relative_error(np.asarray(run(model, other, mask))[0, :1], base[0, :1]) > 1e-4
    assert relative_error(np.asarray(run(model, swapped, mask))[0, 20:], base[0, 20:]) > 1e-4


def test_encode_zeroes_rows_after_the_mask():
    model = random_model(SMALL)
    ids, mask = golden.random_ids(SMALL.vocab_size, (24, 5, 1), seed=2)
    hidden, zeroed = (
        np.asarray(run(model, ids, mask)),
        np.asarray(run_encode(model, ids, mask.astype(bool))),
    )
    np.testing.assert_allclose(zeroed[mask == 1], hidden[mask == 1], rtol=1e-5, atol=1e-6)
    assert not zeroed[mask == 0].any()
    assert np.abs(hidden[mask == 0]).max() > 0.1, "the test is void: there is nothing to zero"


def test_a_row_without_tokens_gives_zeros():
    model = random_model(SMALL)
    out = np.asarray(run_encode(model, np.zeros((1, 8), np.int32), np.zeros((1, 8), np.int32)))
    assert (out == 0).all()


def test_bfloat16_is_close_to_float32():
    model = random_model(SMALL)
    ids, mask = golden.random_ids(SMALL.vocab_size, (60, 9), seed=4)
    half = UMT5Encoder(SMALL, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(nnx.state(half)))
    nnx.update(half, jax.tree.map(lambda x: x.astype(jnp.bfloat16), nnx.state(model)))
    out = run_encode(half, ids, mask)
    assert out.dtype == jnp.bfloat16
    assert relative_error(out.astype(jnp.float32), run_encode(model, ids, mask)) < 0.03


@pytest.mark.slow
def test_every_parameter_gets_a_gradient():
    model = UMT5Encoder(SMALL, rngs=nnx.Rngs(0))
    ids, mask = golden.random_ids(SMALL.vocab_size, (140, 6), seed=4)
    target = np.random.default_rng(0).standard_normal((2, 140, SMALL.d_model)).astype(np.float32)
    grads = nnx.jit(nnx.grad(lambda m: jnp.mean(encode(m, ids, mask) * target)))(model)
    for path, grad in flat_params.flatten(grads).items():
        assert bool(jnp.isfinite(grad).all()), path
        layers = SMALL.num_layers if "block" in path else 1
        assert bool((jnp.abs(grad).reshape(layers, -1).max(axis=1) > 0).all()), path

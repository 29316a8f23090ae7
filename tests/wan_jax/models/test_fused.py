"""The fused kernels against the plain code, interpreted: at awkward sizes, in whole models, on
several devices; what they lower to, and where they are refused.

Tolerances in fp32 are some tens of roundings of 2^-24. In 16 bits a sum in another order can flip a
rounding of 2^-9, in values whose sums partly cancel in the gradients of biases.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from wan_jax.distributed import mesh as mesh_lib
from wan_jax.errors import UserError
from wan_jax.models import fused, lora, quantised, sharded_forward
from wan_jax.models.config import TransformerConfig
from wan_jax.models.fused import calls, kernels
from wan_jax.models.layers import Dense, LoRAParam, gelu
from wan_jax.models.quantised import Quantisation, row_scales
from wan_jax.models.transformer import WanTransformer3D

TOLERANCE = {"float32": 2e-6, "bfloat16": 8e-3}
FP8 = [jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.float8_e4m3fnuz)]
COLLECTIVES = r"all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
NATIVE = Quantisation("fp8", native=True)
CONFIG = TransformerConfig(
    num_attention_heads=2,
    attention_head_dim=32,
    ffn_dim=160,  # 128 + 32
    num_layers=2,
    in_channels=4,
    out_channels=4,
    text_dim=24,
    freq_dim=32,
)


@pytest.fixture
def interpreted(monkeypatch):
    call = functools.partial(calls.pl.pallas_call, interpret=True)
    monkeypatch.setattr(calls.pl, "pallas_call", call)


@pytest.fixture
def everything_in_8_bits(monkeypatch):
    monkeypatch.setattr(quantised, "SMALLEST", 0)


def error(found, wanted) -> float:
    """Relative error in the 2-norm; of what must be zero, its norm."""
    found, wanted = (np.asarray(x, np.float64) for x in (found, wanted))
    return float(np.linalg.norm(found - wanted) / (np.linalg.norm(wanted) or 1.0))


def rounded_rows(x, bound, fp8):
    """`quantise_rows`, rounded by NumPy: XLA for the CPU may round twice without optimisations."""
    scale, inverse = row_scales(jnp.broadcast_to(bound, (*x.shape[:-1], 1)), fp8)
    return (np.asarray(x, np.float32) * np.asarray(inverse)).astype(fp8), scale


def assert_rounded_alike(found, wanted):
    """All but few values, which were rounded to a neighbour."""
    found, wanted = (np.asarray(x, np.float32) for x in (found, wanted))
    assert (found == wanted).mean() > 0.99 and error(found, wanted) < 0.02


def draw_dense(dtype, tokens, width, parts=1, *, scaled=True, rank=6, seed=0) -> Dense:
    """Two videos; rank 0: no adapters. Rows of very different size."""
    keys = iter(jax.random.split(jax.random.key(seed), 8))

    def draw(*shape, dtype=dtype):
        return jax.random.normal(next(keys), shape, dtype)

    powers = jax.random.randint(next(keys), (2, tokens, 1), -3, 4)
    return Dense(
        draw(2, tokens, parts * width),
        draw(parts * width),
        jnp.exp2(powers.astype(jnp.float32)) if scaled else None,
        jnp.abs(draw(parts * width, dtype=jnp.float32)) if scaled else None,
        draw(2, tokens, parts * rank) if rank else None,
        draw(rank, parts * width) * rank**-0.5 if rank else None,
    )


def value_and_gradient(function, arguments):
    """Results, and gradients of a loss that weighs every value differently."""

    def loss(*arguments):
        results = function(*arguments)
        leaves = [x.astype(jnp.float32) for x in jax.tree.leaves(results)]
        return sum(
            (x * jnp.sin(jnp.arange(x.size).reshape(x.shape))).sum() for x in leaves
        ), results

    argnums = tuple(range(len(arguments)))
    (_, results), gradients = jax.jit(jax.value_and_grad(loss, argnums, has_aux=True))(*arguments)
    return results, gradients


# ---- kernels ---------------------------------------------------------------------------------------
@pytest.mark.quick_cases(3)
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "tokens, parts, scaled, rank",
    [(21, 3, True, 6), (7, 1, False, 6), (37, 3, True, 0), (16, 1, False, 16)],
)
def test_heads_and_their_gradient(tokens, parts, scaled, rank, dtype):
    """tokens below, at and above a block of 16; a rank that is padded."""
    heads = [fused.Head(True, True), fused.Head(True, False), fused.Head(False, False)][:parts]
    spec = fused.HeadsSpec(tuple(heads), 32, 1e-6)
    dense = draw_dense(dtype, tokens, 96, parts, scaled=scaled, rank=rank)
    weights = [jnp.linspace(0.5, 2, 96).astype(dtype)] * min(parts, 2)
    angle = jax.random.uniform(jax.random.key(1), (tokens, 16), maxval=6.0)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    found = value_and_gradient(lambda *x: fused.heads(spec, *x, cos, sin), (dense, weights))
    table = fused.rotation(cos, sin)
    wanted = value_and_gradient(lambda *x: fused.plain_heads(spec, *x, table), (dense, weights))
    assert [x.dtype for x in found[0]] == [dtype] * parts
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert error(x, y) < TOLERANCE[dtype]


@pytest.mark.quick_cases(3)
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "tokens, width, after_dense, gated, kept, fp8",
    [
        (21, 96, True, True, True, None),
        (37, 1536, True, False, True, FP8[0]),
        (7, 96, True, True, False, FP8[1]),
        (16, 96, False, False, True, FP8[0]),
    ],
)
def test_norm_and_its_gradient(tokens, width, after_dense, gated, kept, fp8, dtype):
    keys = jax.random.split(jax.random.key(3), 4)
    # a mean of many standard deviations, which a sum of squares would not survive in fp32
    x = (100 + jax.random.normal(keys[0], (2, tokens, width))).astype(dtype)
    dense = draw_dense(dtype, tokens, width, scaled=False, rank=4) if after_dense else None
    gate = jax.random.normal(keys[1], (2, 1, width)) if gated else None
    scale, shift = (jax.random.normal(key, (2, 1, width)) for key in keys[2:])
    spec = fused.NormSpec(1e-6, kept=kept, fp8=fp8)
    bound = 40 * jnp.ones((2, 1, 1))
    arguments = (x, dense, gate, scale, shift)
    found = value_and_gradient(lambda *a: fused.norm(spec, *a, bound)[:2], arguments)

    def plain(x, dense, gate, scale, shift):
        flat = [None if y is None else y[:, 0] for y in (gate, scale, shift)]
        total, normed = fused.plain_norm(spec, dense, x, *flat)
        return (x if total is None else total), normed

    wanted = value_and_gradient(plain, arguments)
    for y, z in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        # the norm subtracts 100: its roundings are relative to that in fp32
        assert error(y, z) < (2e-5 if dtype == "float32" else TOLERANCE[dtype])
    rounded = fused.norm(spec, *arguments, bound).rounded
    assert (rounded is None) == (fp8 is None)
    if rounded is not None:
        values, scales = rounded_rows(wanted[0][1], bound, fp8)
        assert rounded.values.dtype == fp8 and (rounded.scale == scales).all()
        assert_rounded_alike(rounded.values, values)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("tokens, width, fp8", [(21, 160, FP8[0]), (1, 200, FP8[1])])
def test_gelu_rounded_by_rows(tokens, width, fp8):
    dense = draw_dense("bfloat16", tokens, width, rank=0)
    y = dense.result()
    largest = jnp.maximum(y.max(-1, keepdims=True), 0.25)
    activation = gelu(y.astype(jnp.float32)).astype(y.dtype)
    values, scales = rounded_rows(activation, largest.astype(jnp.float32), fp8)
    found = jax.jit(functools.partial(fused.gelu_rows, fp8=fp8))(dense)
    assert found.values.dtype == fp8 and (found.scale == scales).all()
    assert_rounded_alike(found.values, values)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("tokens, width, fp8", [(21, 160, FP8[0]), (1, 200, FP8[1])])
def test_gradient_of_gelu_rounded_by_rows(tokens, width, fp8):
    dense = draw_dense("bfloat16", tokens, width, rank=0)
    upstream = jax.random.normal(jax.random.key(4), dense.product.shape, jnp.bfloat16)
    scale = jnp.exp2(jnp.arange(2 * tokens, dtype=jnp.float32) % 7 - 3).reshape(2, tokens, 1)
    scale = scale.at[0, 0].set(0)  # a row without a gradient

    def activation(product):
        y = dense._replace(product=product).result()
        return gelu(y.astype(jnp.float32)).astype(y.dtype)

    (by_product,) = jax.vjp(activation, dense.product)[1](
        (upstream.astype(jnp.float32) * scale).astype(jnp.bfloat16)
    )
    wanted = by_product.astype(jnp.float32) / dense.rows
    largest = jnp.abs(wanted).max(-1, keepdims=True)
    values, scales = rounded_rows(wanted, jnp.where(largest > 0, largest, 1), fp8)
    found = jax.jit(functools.partial(fused.gelu_gradient_rows, fp8=fp8))(dense, upstream, scale)
    assert found.values.dtype == fp8 and (found.scale == scales).all()
    assert_rounded_alike(found.values, values)


@pytest.mark.parametrize("fp8", FP8, ids=str)
def test_rounding_to_fp8(fp8):
    """Every value of the type, every middle of two neighbours, numbers beside these, and zeros."""
    largest = {FP8[0]: 256, FP8[1]: 128}[fp8]
    values = np.arange(256, dtype=np.uint8).view(fp8).astype(np.float32)
    values = np.unique(values[np.isfinite(values) & (np.abs(values) <= largest)])
    middles = (values[1:] + values[:-1]) / 2
    points = np.concatenate([values, middles, [0.0, -0.0, 1e-30, -1e-30]]).astype(np.float32)
    points = np.concatenate([points, np.nextafter(points, 1e9), np.nextafter(points, -1e9)])
    points = points[np.abs(points) <= largest]
    found = np.asarray(kernels.to_fp8(jnp.asarray(points), fp8))
    wanted = points.astype(fp8)  # by NumPy
    assert (found.astype(np.float32) == wanted.astype(np.float32)).all()


@pytest.mark.parametrize("width", [1, 96, 1536, 8960, 13824, 14336])
def test_pieces_of_a_row(width):
    pieces = kernels.powers_of_two(width)
    assert sum(columns for _, columns in pieces) == width
    assert all(columns & (columns - 1) == 0 and start % columns == 0 for start, columns in pieces)
    assert [start for start, _ in pieces[1:]] == [start + n for start, n in pieces[:-1]]


# ---- models ----------------------------------------------------------------------------------------
INPUTS = (jnp.array([300.0, 700.0]), jax.random.normal(jax.random.key(2), (2, 5, 24)))
LATENTS = jax.random.normal(jax.random.key(1), (2, 1, 10, 14, 4))  # 35 tokens


def make_model(
    kernel: str, dtype="float32", quantisation=None, targets=lora.ATTENTION_TARGETS, **kw
):
    model = WanTransformer3D(
        CONFIG,
        dtype=jnp.dtype(dtype),
        quantisation=quantisation,
        fused=kernel,
        rngs=nnx.Rngs(0),
        **kw,
    )
    return lora.attach(model, lora.LoRAConfig(6, 12.0, targets), jax.random.key(0))


def velocity_and_gradients(model, latents=LATENTS, inputs=INPUTS):
    """The velocity, and the gradients by adapters, which are not zero, and by latents."""
    graph, adapters, rest = nnx.split(model, LoRAParam, ...)
    adapters = jax.tree.map(
        lambda x: 0.1 * jax.random.normal(jax.random.key(x.size), x.shape, x.dtype), adapters
    )

    def function(adapters, latents):
        return nnx.merge(graph, adapters, rest)(latents, *inputs, text_padding=3)

    return value_and_gradient(function, (adapters, latents))


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted", "everything_in_8_bits")
@pytest.mark.parametrize(
    "quantisation, targets, remat",
    [
        (NATIVE, lora.ATTENTION_TARGETS, "save_matmuls"),
        (None, lora.ATTENTION_TARGETS, "none"),
        (NATIVE, ("attn1.to_q", "attn2.to_out.0", "ffn.net.2"), "block"),
        (Quantisation("int8"), lora.ATTENTION_TARGETS, "save_matmuls"),
    ],
)
def test_velocity_and_gradients_are_those_of_the_plain_code(quantisation, targets, remat):
    """Also with adapters on some layers, which are then computed apart, and on the feed-forward
    network, which is then not fused. In float32, where few values in fp8 are rounded otherwise.
    """
    make = functools.partial(make_model, quantisation=quantisation, targets=targets, remat=remat)
    found, wanted = (velocity_and_gradients(make(kernel)) for kernel in ("pallas", "off"))
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert error(x, y) < (5e-6 if quantisation is not NATIVE else 5e-3)


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted", "everything_in_8_bits")
def test_velocity_in_bfloat16_is_as_near_to_float32_as_that_of_the_plain_code():
    exact = velocity_and_gradients(make_model("off", quantisation=NATIVE))
    errors = [
        [error(x, y) for x, y in zip(jax.tree.leaves(results), jax.tree.leaves(exact))]
        for results in (
            velocity_and_gradients(make_model(kernel, "bfloat16", NATIVE))
            for kernel in ("pallas", "off")
        )
    ]
    for ours, plain in zip(*errors, strict=True):
        assert ours < 1.5 * plain  # two draws of about equal size


@pytest.mark.usefixtures("everything_in_8_bits")
def test_the_backward_pass_runs_no_kernel_for_what_was_saved():
    """save_matmuls: GELU's kernel, whose scales are saved, runs once a block, forward."""
    graph, state = nnx.split(
        nnx.eval_shape(lambda: make_model("pallas", "bfloat16", NATIVE, remat="save_matmuls"))
    )

    def loss(state, latents):
        return nnx.merge(graph, state)(latents, *INPUTS).sum()

    gradient = jax.jit(jax.grad(loss, 1))
    jaxpr = str(gradient.trace(state, LATENTS).jaxpr)
    names = re.findall(r"name=(heads|norm|gelu_gradient|gelu)\b", jaxpr)
    assert (names.count("gelu"), names.count("gelu_gradient")) == (1, 1)
    assert names.count("heads") >= 4


# ---- several devices -------------------------------------------------------------------------------
@pytest.mark.usefixtures("interpreted")
def test_devices_work_on_their_own_videos():
    """On eight devices: the results of one, and nothing sent from one to another."""
    dense = jax.tree.map(
        lambda x: jnp.concatenate([x] * 4) if x.ndim == 3 else x,
        draw_dense("float32", 21, 96, scaled=True, rank=4),
    )
    x = jax.random.normal(jax.random.key(5), (8, 21, 96))
    vector = jax.random.normal(jax.random.key(6), (8, 1, 96))
    spec = fused.NormSpec(1e-6, kept=True, fp8=FP8[0])
    heads = fused.HeadsSpec((fused.Head(True, False),), 32, 1e-6)

    def all_three(dense, x, vector):
        normed = fused.norm(spec, x, dense, vector, vector, vector, jnp.abs(vector).max((1, 2)))
        plain = dense._replace(narrow=None, factor=None)
        return normed, fused.heads(heads, dense, [dense.bias]), fused.gelu_rows(plain, FP8[0])

    sharding = NamedSharding(mesh_lib.make_mesh(2, jax.devices()[:8]), P(mesh_lib.AXES))
    split = jax.tree.map(
        lambda y: jax.device_put(y, sharding) if y.ndim == 3 else y, (dense, x, vector)
    )
    assert len(sharding.device_set) == 8
    program = jax.jit(all_three).lower(*split).compile()
    assert not re.findall(COLLECTIVES, program.as_text())
    wanted = jax.jit(all_three)(dense, x, vector)
    for y, z in zip(jax.tree.leaves(program(*split)), jax.tree.leaves(wanted), strict=True):
        assert y.sharding.is_equivalent_to(sharding, y.ndim)
        np.testing.assert_allclose(
            np.asarray(y, np.float32), np.asarray(z, np.float32), rtol=1e-5, atol=1e-5
        )


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted", "everything_in_8_bits")
def test_weights_and_tokens_of_a_video_may_be_split():
    """fsdp 2 x context 2: 35 tokens in rows of 18, the last of which is padding."""
    mesh = mesh_lib.make_mesh(2, jax.devices()[:4], context=2)
    make = functools.partial(make_model, "pallas", quantisation=NATIVE)
    found = velocity_and_gradients(sharded_forward.attach(make(), mesh))
    wanted = velocity_and_gradients(make())
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert error(x, y) < 5e-3  # few values in fp8 are rounded otherwise


# ---- GPUs ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("platform, fnuz", [("cuda", False), ("rocm", False), ("rocm", True)])
def test_a_model_lowers_for_amd_and_nvidia_to_triton_alone(platform, fnuz, absent_gpu):
    """At the sizes of 1.3B, with one block."""
    config = TransformerConfig(num_attention_heads=12, ffn_dim=8960, num_layers=1)
    how = Quantisation("fp8", native=True, fnuz=fnuz)

    def make():
        model = WanTransformer3D(
            config, attention="chunked", quantisation=how, fused="pallas", rngs=nnx.Rngs(0)
        )
        return lora.attach(model, lora.LoRAConfig(), jax.random.key(0))

    graph, state = nnx.split(nnx.eval_shape(make))
    latents = jax.ShapeDtypeStruct((1, 1, 64, 64, 16), jnp.float32)
    text = jax.ShapeDtypeStruct((1, 64, 4096), jnp.bfloat16)

    def velocity(state, latents, text):
        return nnx.merge(graph, state)(latents, jnp.ones(1), text, text_padding=448)

    traced = jax.jit(velocity).trace(state, latents, text)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    calls = re.findall(r'custom_call @"?([^\s"(]+)', text)
    # three norms, q, k, v, and q of cross-attention, GELU
    assert calls.count("__gpu$xla.gpu.triton") == 3 + 3 + 1 + 1
    assert set(calls) == {"__gpu$xla.gpu.triton"}


@pytest.mark.parametrize(
    "request_, words",
    [
        (("pallas", "cpu", "bfloat16", 128), ["pallas", "'cpu'", "fused='off'"]),
        (("pallas", "cuda", "float32", 128), ["float32", "bfloat16"]),
        (("pallas", "rocm", "bfloat16", 24), ["24", "16, 32, 64, 128"]),
        (("triton", "cuda", "bfloat16", 128), ["'triton'", "off, pallas"]),
    ],
)
def test_where_kernels_cannot_run(request_, words):
    with pytest.raises(UserError) as refused:
        fused.choose_fused(*request_)
    assert all(word in str(refused.value) for word in words)


def test_where_kernels_can_run():
    assert fused.choose_fused("off", "cpu", "float32", 24) == "off"
    for platform in ("cuda", "rocm"):
        assert fused.choose_fused("pallas", platform, "bfloat16", 128) == "pallas"

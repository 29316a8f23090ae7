"""GELU's kernel against the plain code, interpreted: at awkward sizes, in whole models, on several
devices; what it lowers to.
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
from wan_jax.models import gelu_kernel, lora, quantised, sharded_forward
from wan_jax.models.config import TransformerConfig
from wan_jax.models.layers import LoRAParam, gelu, gelu_bound
from wan_jax.models.quantised import Quantisation, row_scales, scaled
from wan_jax.models.transformer import WanTransformer3D

FP8 = [jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.float8_e4m3fnuz)]
COLLECTIVES = r"all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
PLAIN, KERNEL = (Quantisation("fp8", native=True, kernel=kernel) for kernel in (False, True))


@pytest.fixture
def interpreted(monkeypatch):
    call = functools.partial(gelu_kernel.pl.pallas_call, interpret=True)
    monkeypatch.setattr(gelu_kernel.pl, "pallas_call", call)


@pytest.fixture
def everything_in_8_bits(monkeypatch):
    monkeypatch.setattr(quantised, "SMALLEST", 0)


def error(found, wanted) -> float:
    """Relative error in the 2-norm."""
    found, wanted = (np.asarray(x, np.float64) for x in (found, wanted))
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def draw(videos, tokens, width, dtype=jnp.bfloat16):
    """A product, scales of rows and outputs, bias. Rows of very different size."""
    keys = jax.random.split(jax.random.key(0), 4)
    powers = jax.random.randint(keys[0], (videos, tokens, 1), -3, 4)
    return (
        jax.random.normal(keys[1], (videos, tokens, width), dtype),
        jnp.exp2(powers.astype(jnp.float32)),
        jnp.abs(jax.random.normal(keys[2], (width,))),
        jax.random.normal(keys[3], (width,), dtype),
    )


# ---- the kernel ------------------------------------------------------------------------------------
@pytest.mark.fp8
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    "tokens, width, fp8, dtype",
    [(21, 160, FP8[0], "bfloat16"), (1, 200, FP8[1], "bfloat16"), (3, 64, FP8[0], "float32")],
)
def test_gelu_rounded_by_rows(tokens, width, fp8, dtype):
    parts = draw(2, tokens, width, dtype)
    y = scaled(*parts).astype(dtype)
    activation = gelu(y.astype(jnp.float32)).astype(dtype)
    scales, inverse = row_scales(gelu_bound(y.max(-1, keepdims=True)), fp8)
    # by NumPy: XLA for the CPU may round twice without optimisations
    wanted = (np.asarray(activation, np.float32) * np.asarray(inverse)).astype(fp8)
    found = jax.jit(functools.partial(gelu_kernel.gelu_rows, fp8=fp8))(*parts)
    assert found.values.dtype == fp8 and (found.scale == scales).all()
    # few values, whose sums were rounded otherwise, are a neighbour
    same = np.asarray(found.values, np.float32) == wanted.astype(np.float32)
    assert same.mean() > 0.99 and error(found.values, wanted) < 0.02


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
    found = np.asarray(gelu_kernel.to_fp8(jnp.asarray(points), fp8))
    wanted = points.astype(fp8)  # by NumPy
    assert (found.astype(np.float32) == wanted.astype(np.float32)).all()


@pytest.mark.parametrize("width", [1, 96, 1536, 8960, 13824, 14336])
def test_pieces_of_a_row(width):
    pieces = gelu_kernel.powers_of_two(width)
    assert sum(columns for _, columns in pieces) == width
    assert all(columns & (columns - 1) == 0 and start % columns == 0 for start, columns in pieces)
    assert [start for start, _ in pieces[1:]] == [start + n for start, n in pieces[:-1]]


@pytest.mark.fp8
@pytest.mark.usefixtures("interpreted")
def test_devices_work_on_their_own_videos():
    """On eight devices: the results of one, and nothing sent from one to another."""
    parts = draw(8, 21, 96)
    sharding = NamedSharding(mesh_lib.make_mesh(2, jax.devices()[:8]), P(mesh_lib.AXES))
    split = [jax.device_put(y, sharding) if y.ndim == 3 else y for y in parts]
    assert len(sharding.device_set) == 8
    function = functools.partial(gelu_kernel.gelu_rows, fp8=FP8[0])
    program = jax.jit(function).lower(*split).compile()
    assert not re.findall(COLLECTIVES, program.as_text())
    for y, z in zip(program(*split), jax.jit(function)(*parts), strict=True):
        assert y.sharding.is_equivalent_to(sharding, y.ndim)
        assert error(y, z) < 1e-3  # compiled apart; at most few values in fp8 differ


# ---- models ----------------------------------------------------------------------------------------
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
INPUTS = (jnp.array([300.0, 700.0]), jax.random.normal(jax.random.key(2), (2, 5, 24)))
LATENTS = jax.random.normal(jax.random.key(1), (2, 1, 10, 14, 4))  # 35 tokens


def make_model(quantisation, targets=lora.ATTENTION_TARGETS, remat="none", dtype="float32"):
    model = WanTransformer3D(
        CONFIG, dtype=jnp.dtype(dtype), quantisation=quantisation, remat=remat, rngs=nnx.Rngs(0)
    )
    return lora.attach(model, lora.LoRAConfig(6, 12.0, targets), jax.random.key(0))


def velocity_and_gradients(model):
    """The velocity, and the gradients by adapters, which are not zero, and by latents."""
    graph, adapters, rest = nnx.split(model, LoRAParam, ...)
    adapters = jax.tree.map(
        lambda x: 0.1 * jax.random.normal(jax.random.key(x.size), x.shape, x.dtype), adapters
    )

    def loss(adapters, latents):
        y = nnx.merge(graph, adapters, rest)(latents, *INPUTS, text_padding=3)
        return (y * jnp.sin(jnp.arange(y.size).reshape(y.shape))).sum(), y

    return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(adapters, LATENTS)


@pytest.mark.fp8
@pytest.mark.slow
@pytest.mark.usefixtures("interpreted", "everything_in_8_bits")
@pytest.mark.parametrize(
    "targets, remat",
    [(lora.ATTENTION_TARGETS, "save_matmuls"), (("attn1.to_q", "ffn.net.2"), "block")],
)
def test_velocity_and_gradients_are_those_of_the_plain_code(targets, remat):
    """Also with adapters on the second layer, which take the value that was not rounded."""
    make = functools.partial(make_model, targets=targets, remat=remat)
    found, wanted = (velocity_and_gradients(make(how)) for how in (KERNEL, PLAIN))
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert error(x, y) < 5e-3  # few values in fp8 are rounded otherwise


@pytest.mark.usefixtures("everything_in_8_bits")
@pytest.mark.parametrize("targets, calls", [(("ffn.net.2",), 1), (("ffn.net.0.proj",), 0)])
def test_where_the_kernel_is_used(targets, calls):
    """Once a block in the update, whose backward pass has saved what follows; not with adapters on
    the layer before it, whose share it does not add.
    """
    graph, state = nnx.split(
        nnx.eval_shape(lambda: make_model(KERNEL, targets, "save_matmuls", "bfloat16"))
    )

    def loss(state, latents):
        return nnx.merge(graph, state)(latents, *INPUTS).sum()

    jaxpr = str(jax.jit(jax.grad(loss, 1)).trace(state, LATENTS).jaxpr)
    assert len(re.findall(r"name=gelu_rows\b", jaxpr)) == calls


@pytest.mark.fp8
@pytest.mark.slow
@pytest.mark.usefixtures("interpreted", "everything_in_8_bits")
def test_weights_and_tokens_of_a_video_may_be_split():
    """fsdp 2 x context 2: 35 tokens in rows of 18, the last of which is padding."""
    mesh = mesh_lib.make_mesh(2, jax.devices()[:4], context=2)
    found = velocity_and_gradients(sharded_forward.attach(make_model(KERNEL), mesh))
    wanted = velocity_and_gradients(make_model(KERNEL))
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert error(x, y) < 5e-3  # few values in fp8 are rounded otherwise


# ---- GPUs ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("platform, fnuz", [("cuda", False), ("rocm", False), ("rocm", True)])
def test_a_model_lowers_for_amd_and_nvidia_to_triton_alone(platform, fnuz, absent_gpu):
    """At the sizes of 1.3B, with one block."""
    config = TransformerConfig(num_attention_heads=12, ffn_dim=8960, num_layers=1)
    how = Quantisation("fp8", native=True, fnuz=fnuz, kernel=True)

    def make():
        return WanTransformer3D(config, attention="chunked", quantisation=how, rngs=nnx.Rngs(0))

    graph, state = nnx.split(nnx.eval_shape(make))
    latents = jax.ShapeDtypeStruct((1, 1, 64, 64, 16), jnp.float32)
    text = jax.ShapeDtypeStruct((1, 64, 4096), jnp.bfloat16)

    def velocity(state, latents, text):
        return nnx.merge(graph, state)(latents, jnp.ones(1), text, text_padding=448)

    traced = jax.jit(velocity).trace(state, latents, text)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert re.findall(r'custom_call @"?([^\s"(]+)', text) == ["__gpu$xla.gpu.triton"]

"""Weights of 8 and 4 bits: what they are rounded to, products in 8 bits, and models made of them."""

import functools
import types
from statistics import NormalDist

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from tests.grpo.tiny_policy import CONFIG
from wan_jax.distributed import mesh as mesh_lib
from wan_jax.errors import UserError
from wan_jax.models import flat_params, lora, quantised
from wan_jax.models.layers import LayerNorm, Linear, fused_dense, layer_norm, layer_norm_bound
from wan_jax.models.quantised import NF4_BLOCK, NF4_VALUES, Quantisation, product_8bit
from wan_jax.models.transformer import WanTransformer3D
from wan_jax.storage import model_dir

FP8 = {False: ml_dtypes.float8_e4m3fn, True: ml_dtypes.float8_e4m3fnuz}
KINDS = [Quantisation("fp8"), Quantisation("fp8", fnuz=True), *map(Quantisation, ("int8", "nf4"))]
KERNEL = np.random.default_rng(0).standard_normal((128, 48)).astype(np.float32)
KERNEL[:, 3] = 0  # a column without a scale


@pytest.fixture
def everything_in_8_bits(monkeypatch):
    monkeypatch.setattr(quantised, "SMALLEST", 0)


@pytest.mark.parametrize("how", KINDS, ids=str)
def test_values_are_the_nearest_ones(how):
    """No other value of the type is nearer, with the scale that takes the largest weight to the
    largest value.
    """
    values, scale = map(np.asarray, how.quantise(jnp.asarray(KERNEL)))
    found = np.asarray(how.dequantise(values, scale, jnp.float32))
    w = KERNEL.T.astype(np.float64)
    if how.kind == "nf4":
        levels, block = NF4_VALUES, NF4_BLOCK
    elif how.kind == "int8":
        levels, block = np.arange(-127, 128), w.shape[1]
    else:
        levels = np.arange(256, dtype=np.uint8).view(FP8[how.fnuz]).astype(np.float64)
        levels, block = levels[np.isfinite(levels)], w.shape[1]
    blocks = w.reshape(len(w), -1, block)
    scales = np.abs(blocks).max(-1, keepdims=True) / levels.max()
    scales[scales == 0] = 1
    nearest = np.abs(blocks[..., None] / scales[..., None] - levels).min(-1) * scales
    error = np.abs(found - w).reshape(blocks.shape)
    np.testing.assert_allclose(error, nearest, atol=1e-6)  # ties and the rounding of scales


@pytest.mark.fp8
@pytest.mark.parametrize("how", KINDS, ids=str)
def test_dequantised_values_are_rounded_once(how):
    """To bfloat16: values times fp32 scales, not scales that were rounded before."""
    values, scale = how.quantise(jnp.asarray(KERNEL))
    found = np.asarray(how.dequantise(values, scale, jnp.bfloat16))
    exact = np.asarray(how.dequantise(values, scale, jnp.float32))
    np.testing.assert_array_equal(found, exact.astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("how", KINDS, ids=str)
def test_the_shape_of_the_kernel_follows_from_that_of_its_values(how):
    values, _ = jax.eval_shape(how.quantise, jnp.asarray(KERNEL))
    assert how.kernel_shape(values.shape) == KERNEL.shape
    assert how.kernel_shape((30, *values.shape)) == (30, *KERNEL.shape)


def test_scales_are_applied_in_fp32():
    """To products in bfloat16, whose dtype has 8 bits of the scales' 24."""
    rng = np.random.default_rng(5)
    product = jnp.asarray(rng.standard_normal((4, 48)), jnp.bfloat16)
    scale = rng.uniform(0.5, 1, 48).astype(np.float32)
    found = quantised.scaled(product, jnp.full((4, 1), 0.25), jnp.asarray(scale))
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, np.asarray(product, np.float32) * (0.25 * scale))


@pytest.mark.parametrize("fp8, largest", [(jnp.float8_e4m3fn, 256), (jnp.float8_e4m3fnuz, 128)])
def test_scales_of_rows_of_any_size(fp8, largest):
    """Powers of two and their inverses, from subnormal numbers to nearly the largest ones of fp32."""
    bounds = np.float32([1e-42, 1e-38, 1e-30, 0.3, 0.5, 1.0, 1.99, 1e30, 1.6e38])
    scale, inverse = map(np.asarray, quantised.row_scales(jnp.asarray(bounds), fp8))
    assert (scale * inverse == 1).all() and (np.frexp(scale)[0] == 0.5).all()
    upper = bounds * inverse
    assert (upper < largest).all() and (upper[2:] >= largest / 2).all()


def test_which_products_have_8_bits():
    """Three layers of Wan 1.3B's width have together what one has not."""

    def layers(*widths, native=True):
        how = Quantisation("fp8", native=native)
        return [
            types.SimpleNamespace(quantisation=how, in_features=n_in, out_features=n_out)
            for n_in, n_out in widths
        ]

    in_8bit = quantised.QuantisedLinear.in_8bit
    assert not in_8bit(layers((1536, 1536))) and in_8bit(layers(*[(1536, 1536)] * 3))
    assert in_8bit(layers((2048, 2048))) and not in_8bit(layers((2048, 2047)))
    assert not in_8bit(layers((5120, 5120), native=False))


@pytest.mark.fp8
def test_each_row_has_a_bound_of_its_own(everything_in_8_bits):
    """Where the caller knows none: a small row keeps its values beside a large one."""
    layer = quantised.dense(
        Quantisation("fp8", native=True), 128, 48, dtype=jnp.float32, rngs=nnx.Rngs(0)
    )
    x = np.random.default_rng(3).standard_normal((2, 3, 128)).astype(np.float32)
    x *= np.float32([[[1e-6], [1], [1e6]]])
    weight = layer.quantisation.dequantise(
        layer.quantised[...], layer.quantised_scale[...], jnp.float32
    )
    found, wanted = (np.asarray(y, np.float64) for y in (layer(jnp.asarray(x)), x @ weight.T))
    error = np.linalg.norm(found - wanted, axis=-1) / np.linalg.norm(wanted, axis=-1)
    assert error.max() < 0.06  # e4m3: 2.6 % of relative error on average


def test_published_values_of_nf4():
    """Zero and quantiles of a normal distribution: 8 positive and 7 negative ones, the first at
    0.9677083 (QLoRA, appendix E).
    """
    quantile = np.vectorize(NormalDist().inv_cdf)
    end = 0.9677083
    positive = quantile(np.linspace(end, 0.5, 9)[:-1])
    negative = -quantile(np.linspace(end, 0.5, 8)[:-1])
    values = np.sort([*positive, 0.0, *negative])
    np.testing.assert_allclose(NF4_VALUES, values / values.max(), atol=1e-6)


def rows_8bit(x, dtype, largest):
    """Rows of x rounded as products do, in float64: by powers of two."""
    x = x.astype(np.float64)
    bound = np.abs(x).max(-1, keepdims=True)
    scale = 2.0 ** (np.floor(np.log2(bound)) - largest)
    return (x / scale).astype(np.float32).astype(dtype).astype(np.float64) * scale


@pytest.mark.fp8
@pytest.mark.parametrize("fnuz, largest", [(False, 7), (True, 6)])
def test_product_in_8_bits_and_its_gradient(fnuz, largest):
    """Against float64 on the rounded operands; rows of very different size, and an unsafe zero row."""
    how, dtype = Quantisation("fp8", native=True, fnuz=fnuz), FP8[fnuz]
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2, 5, 128)).astype(np.float32) * np.float32(
        [[[1e-20], [1e-4], [1], [300], [1e6]]]
    )
    values, scale = how.quantise(jnp.asarray(KERNEL))
    weight = np.asarray(how.dequantise(values, scale, jnp.float32)).astype(np.float64)  # [out, in]
    upstream = rng.standard_normal((2, 5, 48)).astype(np.float32) * np.float32(
        [[[1e4], [1e-10], [1e-3], [1], [30]]]
    )

    def product(x):
        return product_8bit(x, values, scale, jnp.abs(x).max(-1, keepdims=True))

    found, transpose = jax.vjp(product, jnp.asarray(x))
    wanted = rows_8bit(x, dtype, largest) @ weight.T
    size = np.abs(wanted).max(-1, keepdims=True)  # fp32 sums, relative to the row
    np.testing.assert_allclose(found / size, wanted / size, atol=1e-6)
    scaled = rows_8bit(upstream * np.asarray(scale), dtype, largest)
    wanted = scaled @ (weight / np.asarray(scale, np.float64)[:, None])
    found = np.asarray(transpose(jnp.asarray(upstream))[0], np.float64)
    error = np.linalg.norm(found - wanted, axis=-1) / np.linalg.norm(wanted, axis=-1)
    assert error.max() < 1e-5
    assert np.isfinite(product(jnp.zeros((1, 128)))).all()


def test_bounds_of_rows():
    """One large value gives the largest possible layer norm."""
    rng = np.random.default_rng(2)
    x = rng.standard_normal((3, 64)).astype(np.float32)
    x[1] = 0
    x[1, 5] = 1e4
    scale, shift = rng.standard_normal((2, 64)).astype(np.float32)
    result = np.abs(layer_norm(jnp.asarray(x), 0.0) * scale + shift)
    bound = float(layer_norm_bound(64, jnp.asarray(scale), jnp.asarray(shift))[0])
    assert result.max() <= bound
    norm = LayerNorm(64)
    assert norm.bound.shape == (1,) and np.abs(norm(jnp.asarray(x))).max() <= norm.bound


@pytest.mark.fp8
@pytest.mark.parametrize("how", [*KINDS, Quantisation("fp8", native=True)], ids=str)
def test_fused_layers_and_separate_ones(how, everything_in_8_bits):
    """With biases and adapters, and equal to the dequantised layers up to the rounding of x."""
    rngs = nnx.Rngs(0)
    make = functools.partial(quantised.dense, how, dtype=jnp.float32, rngs=rngs)
    layers = nnx.List([make(128, n) for n in (32, 48)])
    lora.attach(layers, lora.LoRAConfig(4, 8.0, ("0", "1")), jax.random.key(0))
    for layer in layers:
        layer.bias[...] = jax.random.normal(rngs.params(), layer.bias.shape)
        layer.lora_b[...] = jax.random.normal(rngs.params(), layer.lora_b.shape)
    x = jax.random.normal(rngs.params(), (2, 7, 128))
    fused = fused_dense(list(layers), x)
    for layer, y in zip(layers, fused):
        np.testing.assert_allclose(layer(x), y, rtol=1e-5, atol=1e-5)
        plain = Linear(128, layer.out_features, rngs=rngs)
        weight = how.dequantise(layer.quantised[...], layer.quantised_scale[...], jnp.float32)
        plain.kernel[...], plain.bias = weight.T, layer.bias
        plain.lora_a, plain.lora_b, plain.lora_scale = layer.lora_a, layer.lora_b, layer.lora_scale
        error = np.linalg.norm(plain(x) - y) / np.linalg.norm(y)
        assert error < (0.04 if how.native else 1e-5)  # e4m3 has 3 bits: 2.6 % of relative error


@pytest.mark.fp8
@pytest.mark.slow
@pytest.mark.parametrize("weights, tolerance", [("fp8", 0.06), ("int8", 0.015)])
@pytest.mark.usefixtures("everything_in_8_bits")
def test_velocity_near_that_of_the_model(weights, tolerance):
    """The error of a random model, whose residual stream it is a part of; more than that of one product is
    wrong. The gradient by the latents is near too.
    """
    how = Quantisation(weights, native=weights == "fp8")
    plain = WanTransformer3D(CONFIG, dtype=jnp.float32, rngs=nnx.Rngs(0))
    state = flat_params.flatten(nnx.state(plain))
    model = WanTransformer3D(CONFIG, dtype=jnp.float32, quantisation=how, rngs=nnx.Rngs(0))
    like = nnx.state(model)
    flat = {k: v for k, v in state.items() if k in flat_params.flatten(like)}
    for name, parts in quantised.kernels(
        {k: v.shape for k, v in flat_params.flatten(like).items()}
    ).items():
        flat |= zip(parts, jax.vmap(how.quantise)(state[name]))
    nnx.update(model, flat_params.unflatten(like, flat))
    keys = jax.random.split(jax.random.key(1), 2)
    x = jax.random.normal(keys[0], (2, 1, 8, 8, 4))
    text = jax.random.normal(keys[1], (2, 5, 12))

    def velocity(model, x):
        return model(x, jnp.full(2, 500.0), text, text_padding=3)

    def both(model):
        return velocity(model, x), jax.grad(lambda x: (velocity(model, x) ** 2).sum())(x)

    found, wanted = both(model), both(plain)
    for y, z in zip(found, wanted):
        error = np.linalg.norm(y - z) / np.linalg.norm(z)
        assert 1e-4 < error < tolerance


@pytest.mark.usefixtures("everything_in_8_bits")
def test_products_in_8_bits_are_not_computed_again():
    """In the backward pass with save_matmuls: each product once forward and once backward."""
    how = Quantisation("fp8", native=True)

    def products(remat):
        graph, state = nnx.split(
            nnx.eval_shape(
                lambda: WanTransformer3D(CONFIG, remat=remat, quantisation=how, rngs=nnx.Rngs(0))
            )
        )
        x = jax.ShapeDtypeStruct((1, 1, 4, 4, 4), jnp.float32)
        text = jax.ShapeDtypeStruct((1, 3, 12), jnp.bfloat16)

        def loss(x, state, text):
            return nnx.merge(graph, state)(x, jnp.ones(1), text).sum()

        jaxpr = str(jax.make_jaxpr(jax.grad(loss))(x, state, text))
        # operands of dot_general are f8 arrays that were just rounded
        return jaxpr.count("new_dtype=float8_e4m3fn")

    # self-attention 2, cross-attention 3, feed-forward 2. The text has no gradient by the latents,
    # and the last result of a block is not needed for the backward pass.
    assert products("save_matmuls") == 7 + 6
    assert products("block") == 7 + 6 + 6


@pytest.mark.fp8
@pytest.mark.parametrize("how", KINDS[:3], ids=str)
@pytest.mark.parametrize("fsdp", [1, 2])
def test_loading_quantises_the_stored_weights(folders, how, fsdp):
    model = model_dir.open_model(folders[1])
    mesh = mesh_lib.make_mesh(fsdp, jax.devices()[:fsdp])
    _, state = model_dir.build("transformer", model, mesh=mesh, quantisation=how)
    flat, stored = flat_params.flatten(state), model.arrays("transformer")
    names = quantised.kernels({k: v.shape for k, v in flat.items()})
    assert len(names) == 10  # attention twice, the feed-forward network
    for name, (values, scales) in names.items():
        wanted = jax.vmap(how.quantise)(jnp.asarray(stored.read(name)))
        assert (np.asarray(flat[values]) == np.asarray(wanted[0])).all()
        np.testing.assert_allclose(flat[scales], wanted[1], rtol=1e-6)
    assert (flat["proj_out/kernel"] == stored.read("proj_out/kernel")).all()


def test_inputs_that_nf4_cannot_store(folders):
    model = model_dir.open_model(folders[1])
    with pytest.raises(UserError, match=r"nf4.* 48 "):
        model_dir.build("transformer", model, quantisation=Quantisation("nf4"))


class Device:
    def __init__(self, compute_capability=None, kind="a device"):
        self.device_kind = kind
        if compute_capability:
            self.compute_capability = compute_capability


ABSENT = Device("<unknown compute-capability>", "MI300X")  # one to compile for


@pytest.mark.parametrize(
    "weights, platform, device, wanted",
    [
        ("dtype", "cuda", Device("9.0"), None),
        ("fp8", "cuda", Device("9.0"), Quantisation("fp8", native=True, kernel=True)),
        ("fp8", "cuda", Device("8.0"), Quantisation("fp8")),
        ("fp8", "rocm", Device("gfx942:sramecc+"), Quantisation("fp8", native=True, fnuz=True)),
        ("fp8", "rocm", Device("gfx950"), Quantisation("fp8", native=True)),
        ("fp8", "cuda", Device("8.9"), Quantisation("fp8", native=True, kernel=True)),
        ("fp8", "rocm", ABSENT, Quantisation("fp8", native=True, fnuz=True)),
        ("fp8", "rocm", Device(kind="MI325X"), Quantisation("fp8", native=True, fnuz=True)),
        ("fp8", "rocm", Device(kind="MI350X"), Quantisation("fp8", native=True)),
        ("fp8", "rocm", Device(kind="MI355X"), Quantisation("fp8", native=True)),
        ("fp8", "cuda", Device("<unknown>"), Quantisation("fp8")),
        ("fp8", "rocm", Device(), Quantisation("fp8")),
        ("fp8", "cpu", Device(), Quantisation("fp8")),
        ("int8", "rocm", Device("gfx942"), Quantisation("int8")),
    ],
)
def test_what_a_device_multiplies(weights, platform, device, wanted):
    assert Quantisation.choose(weights, platform, device) == wanted
    with pytest.raises(ValueError, match="fp4"):
        Quantisation.choose("fp4", platform, device)

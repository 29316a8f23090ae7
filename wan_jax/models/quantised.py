"""Dense layers whose frozen weights have 8 or 4 bits: fp8, int8 or nf4.

A weight W [in, out] is stored transposed, [out, in], because 8-bit products want the summed axis
contiguous, with scales in fp32:

| kind | values | scales | products |
|---|---|---|---|
| fp8 | e4m3, 8 bits | one for each output | in 8 bits where the device does that, see below |
| int8 | integers in -127..127 | one for each output | W is dequantised to the layer's dtype |
| nf4 | 4-bit normal floats, two in a byte | one for each `NF4_BLOCK` inputs of an output | the same |

nf4 is that of QLoRA (Dettmers et al. 2023, arXiv 2305.14314, appendix E).

Products in 8 bits: x is quantised to e4m3 on the fly, every row by a power of two, so that the
rounding of its values does not depend on the largest one. The product is accumulated in fp32, and
the scales multiply the result. In the backward pass the gradient is quantised in the same way, after it was
multiplied by the scales of the outputs. There is no gradient of the weight: it is frozen.

e4m3 is `float8_e4m3fn` (largest value 448) but on AMD's gfx94x, whose matrix units have
`float8_e4m3fnuz` (largest value 240).
"""

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from wan_jax.choices import WEIGHTS
from wan_jax.errors import UserError
from wan_jax.models.layers import MATMUL, Linear, Rounded

NF4_BLOCK = 64  # inputs that share a scale
# The 16 values of nf4: quantiles of a normal distribution, scaled to [-1, 1], zero included.
NF4_VALUES = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)
WEIGHT = "quantised"  # names of the parameters in a state
SCALE = "quantised_scale"
FNUZ = "gfx94"  # AMD's architectures with their own fp8
ARCHITECTURES = {"MI300": "gfx942", "MI325": "gfx942", "MI350": "gfx950", "MI355": "gfx950"}
# Weights of fewer elements are dequantised: quantising x takes as long as 8 bits save.
SMALLEST = 2**22
COMPUTE_CAPABILITY = 8.9  # NVIDIA's first with fp8


@dataclasses.dataclass(frozen=True)
class Quantisation:
    """How frozen dense layers are stored and multiplied.

    Attributes:
        kind: fp8, int8 or nf4.
        native: whether products are computed in 8 bits; only fp8.
        fnuz: whether fp8 is AMD's `float8_e4m3fnuz`.
        kernel: whether GELU between two products in 8 bits is the kernel of `gelu_kernel.py`.
    """

    kind: str
    native: bool = False
    fnuz: bool = False
    kernel: bool = False

    @property
    def dtype(self) -> np.dtype:
        """The type of the stored values."""
        return jnp.dtype(
            {
                "fp8": jnp.float8_e4m3fnuz if self.fnuz else jnp.float8_e4m3fn,
                "int8": jnp.int8,
                "nf4": jnp.uint8,
            }[self.kind]
        )

    @classmethod
    def choose(cls, weights: str, platform: str, device) -> "Quantisation | None":
        """Return how weights are stored on a device.

        weights: one of `WEIGHTS`; `dtype`: not quantised. platform: of `attention.platform_of`.
        """
        if weights not in WEIGHTS:
            raise ValueError(f"weights={weights!r} is unknown; choose one of {', '.join(WEIGHTS)}")
        if weights == "dtype":
            return None
        architecture = architecture_of(device)
        native = {
            "cuda": re.fullmatch(r"[0-9.]+", architecture)
            and float(architecture) >= COMPUTE_CAPABILITY,
            "rocm": architecture.startswith((FNUZ, "gfx95")),
        }
        fp8 = weights == "fp8"
        multiplied = fp8 and bool(native.get(platform))
        return cls(
            weights,
            native=multiplied,
            fnuz=fp8 and architecture.startswith(FNUZ),
            kernel=multiplied and platform == "cuda",  # has not run on an AMD GPU
        )

    def check(self, n_in: int) -> None:
        """Raise `UserError` where a weight with `n_in` inputs cannot be quantised."""
        if self.kind == "nf4" and n_in % NF4_BLOCK:
            raise UserError(
                f"weights=nf4: a dense layer has {n_in} inputs, which is no multiple of {NF4_BLOCK}; use "
                "int8 or fp8"
            )

    def describe(self) -> str:
        """Return the kind and how it is multiplied, as text."""
        how = "multiplied in 8 bits" if self.native else "dequantised before products"
        return f"{self.kind} weights, {how}"

    def kernel_shape(self, values: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the kernel [..., n_in, n_out] that has values of this shape."""
        *stack, n_out, n_in = values
        return (*stack, n_in * 2 if self.kind == "nf4" else n_in, n_out)

    # ---- weights -----------------------------------------------------------------------------
    def quantise(self, kernel: Float[Array, "n_in n_out"]) -> tuple[jax.Array, jax.Array]:
        """Return values and scales of a weight."""
        w = kernel.astype(jnp.float32).T
        if self.kind == "nf4":
            blocks = w.reshape(len(w), -1, NF4_BLOCK)
            scale = nonzero(jnp.abs(blocks).max(-1))
            middles = (NF4_VALUES[1:] + NF4_VALUES[:-1]) / 2
            codes = jnp.searchsorted(middles, blocks / scale[..., None], method="compare_all")
            codes = codes.reshape(len(w), -1).astype(jnp.uint8)
            return codes[:, ::2] | codes[:, 1::2] << 4, scale
        largest = 127.0 if self.kind == "int8" else float(jnp.finfo(self.dtype).max)
        scale = nonzero(jnp.abs(w).max(-1)) / largest
        w = w / scale[:, None]
        return (jnp.round(w) if self.kind == "int8" else w).astype(self.dtype), scale

    def dequantise(self, values: jax.Array, scale: jax.Array, dtype) -> jax.Array:
        """Return the transposed weight [n_out, n_in] in `dtype`."""
        if self.kind == "nf4":
            codes = jnp.stack([values & 15, values >> 4], axis=-1).reshape(*scale.shape, NF4_BLOCK)
            return (
                (jnp.asarray(NF4_VALUES)[codes] * scale[..., None])
                .reshape(len(values), -1)
                .astype(dtype)
            )
        return (values.astype(jnp.float32) * scale[:, None]).astype(dtype)


class QuantisedLinear(Linear):
    """A `Linear` whose weight is quantised and frozen."""

    def __init__(
        self, in_features: int, out_features: int, quantisation: Quantisation, *, dtype, rngs
    ):
        quantisation.check(in_features)
        super().__init__(in_features, out_features, dtype=dtype, rngs=rngs)
        values, scale = quantisation.quantise(self.kernel[...])
        del self.kernel
        self.quantised = nnx.Param(values)
        self.quantised_scale = nnx.Param(scale)
        self.quantisation = quantisation

    @property
    def stack(self) -> tuple[int, ...]:
        """As in `Linear`."""
        return self.quantised.shape[:-2]

    @staticmethod
    def in_8bit(layers: Sequence[Linear]) -> bool:
        """As in `Linear`."""
        first = cast(QuantisedLinear, layers[0])
        outputs = sum(layer.out_features for layer in layers)
        return first.quantisation.native and first.in_features * outputs >= SMALLEST

    @property
    def has_kernel(self) -> bool:
        """Whether GELU of the result is computed by `gelu_kernel.gelu_rows`."""
        return self.quantisation.kernel and self.in_8bit([self]) and self.lora_a is None

    def parts(
        self, x: Float[Array, "*batch n_in"], bound: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Return what the result is made of (`scaled`): product, scales of rows and outputs, bias."""
        assert self.bias is not None
        x = x.astype(self.dtype)
        product, rows = named_product(x, self.quantised[...], jax.lax.stop_gradient(bound))
        return product, jax.lax.stop_gradient(rows), self.quantised_scale[...], self.bias[...]

    @staticmethod
    def product(
        layers: Sequence[Linear],
        x: Float[Array, "*batch n_in"],
        bound: jax.Array | Rounded | None = None,
    ) -> jax.Array:
        """As in `Linear`."""
        values, scales = (
            jnp.concatenate([getattr(layer, name)[...] for layer in layers])
            for name in (WEIGHT, SCALE)
        )
        first = cast(QuantisedLinear, layers[0])
        if not first.in_8bit(layers):
            return x @ first.quantisation.dequantise(values, scales, x.dtype).T
        bound = jnp.abs(x).max(-1, keepdims=True) if bound is None else bound
        return product_8bit(x, values, scales, jax.lax.stop_gradient(bound))


def architecture_of(device) -> str:
    """Return the compute capability of an NVIDIA GPU ("9.0"), or AMD's name of an architecture
    ("gfx942"); "" where it is unknown. Devices to compile for, which are not there, have only a kind.
    """
    found = str(getattr(device, "compute_capability", ""))
    if found and not found.startswith("<"):
        return found
    kind = str(getattr(device, "device_kind", ""))
    return next((name for amd, name in ARCHITECTURES.items() if amd in kind), "")


def kernels(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[str, ...]]:
    """Return {name of a kernel as it is stored: names of its values and scales}.

    shapes: of a model's parameters, by name.
    """
    found = {}
    for name in shapes:
        if name.endswith("/" + WEIGHT):
            layer = name.removesuffix(WEIGHT)
            found[layer + "kernel"] = (name, layer + SCALE)
    return found


def quantise_layers(
    quantisation: Quantisation, kernels: Iterable[jax.Array], values, scales
) -> tuple[jax.Array, jax.Array]:
    """Return values and scales of all layers of a kernel. Only one unquantised layer is on the
    device at a time.

    kernels: [n_in, n_out] of each layer, made when it is needed. values, scales: abstract, with
    shardings.
    """
    put = _put_layer(quantisation, (values.sharding, scales.sharding))
    values, scales = (jnp.zeros(x.shape, x.dtype, device=x.sharding) for x in (values, scales))
    for layer, kernel in enumerate(kernels):
        values, scales = jax.block_until_ready(put(values, scales, layer, kernel))
    return values, scales


@functools.cache
def _put_layer(quantisation: Quantisation, shardings):
    """Return the jitted function that quantises a kernel into row `layer` of values and scales."""

    @functools.partial(jax.jit, donate_argnums=(0, 1), out_shardings=shardings)
    def put(values, scales, layer, kernel):
        new_values, new_scales = quantisation.quantise(kernel)
        return values.at[layer].set(new_values), scales.at[layer].set(new_scales)

    return put


def dense(
    quantisation: Quantisation | None, in_features: int, out_features: int, *, dtype, rngs
) -> Linear:
    """Return a dense layer with random weights."""
    if quantisation is None:
        return Linear(in_features, out_features, dtype=dtype, rngs=rngs)
    return QuantisedLinear(in_features, out_features, quantisation, dtype=dtype, rngs=rngs)


def nonzero(scale: jax.Array) -> jax.Array:
    """Return the scales, with 1 for zero."""
    return jnp.where(scale > 0, scale, 1)


def scaled(
    product: Float[Array, "... n_out"],
    rows: jax.Array,
    scale: jax.Array,
    bias: jax.Array | None = None,
) -> jax.Array:
    """Return a product in 8 bits times its scales, fp32."""
    y = product.astype(jnp.float32) * (rows * scale)
    return y if bias is None else y + bias


def quantise_rows(x: jax.Array, bound: jax.Array, dtype) -> Rounded:
    """Return the rows of x [..., n] in an fp8 `dtype`, with the scales of `row_scales` for their
    bounds of |x|, [..., 1].
    """
    bound = jnp.broadcast_to(nonzero(bound.astype(jnp.float32)), (*x.shape[:-1], 1))
    scale, inverse = row_scales(bound, dtype)
    return Rounded((x.astype(jnp.float32) * inverse).astype(dtype), scale)


def row_scales(largest: jax.Array, dtype) -> tuple[jax.Array, jax.Array]:
    """Return (scales, their inverses), fp32: powers of two with which a positive value `largest` is in
    the upper part of the range of an fp8 `dtype`.
    """
    # 2^(floor(log2 largest) - 7): values up to 256 of 448; for fnuz up to 128 of 240
    headroom = 7 if dtype == jnp.float8_e4m3fn else 6
    exponent = (jax.lax.bitcast_convert_type(largest, jnp.int32) >> 23) - 127 - headroom
    exponent = jnp.clip(exponent, -120, 120)
    scale, inverse = (
        jax.lax.bitcast_convert_type((sign * exponent + 127) << 23, jnp.float32) for sign in (1, -1)
    )
    return scale, inverse


def multiply_8bit(
    x: jax.Array, bound: jax.Array | Rounded, values: jax.Array, axis: int, dtype
) -> tuple[jax.Array, jax.Array]:
    """Return (product in `dtype`, scales [..., 1]) of x quantised by rows and `values`, summed over
    axis `axis` of `values`.
    """
    rows, scale = bound if isinstance(bound, Rounded) else quantise_rows(x, bound, values.dtype)
    product = jax.lax.dot_general(
        rows, values, (((x.ndim - 1,), (axis,)), ((), ())), preferred_element_type=dtype
    )
    return product, scale


def product_8bit(
    x: jax.Array, values: jax.Array, scale: jax.Array, bound: jax.Array | Rounded
) -> jax.Array:
    """Return x W computed in 8 bits, fp32. values: fp8 [n_out, n_in]; scale: fp32 [n_out]; bound:
    of |x|, [..., 1].

    The product before its scales has the dtype of x [..., n_in] and a name for rematerialisation
    policies. What follows is elementwise, and is fused into what uses the result.
    """
    product, rows = named_product(x, values, bound)
    return scaled(product, jax.lax.stop_gradient(rows), scale)


def named_product(
    x: jax.Array, values: jax.Array, bound: jax.Array | Rounded
) -> tuple[jax.Array, jax.Array]:
    """Return `unscaled_product` with names for rematerialisation policies."""
    product, rows = (checkpoint_name(y, MATMUL) for y in unscaled_product(x, values, bound))
    return product, rows


@jax.custom_vjp
def unscaled_product(
    x: jax.Array, values: jax.Array, bound: jax.Array | Rounded
) -> tuple[jax.Array, jax.Array]:
    """Return `multiply_8bit` of x and values [n_out, n_in]. In the backward pass, the gradient of
    the product is computed in the same way; the scales have none.
    """
    return multiply_8bit(x, bound, values, 1, x.dtype)


def _forward(x, values, bound):
    product, rows = unscaled_product(x, values, bound)
    # named here too: the backward pass would compute the bound of the rows again
    return (product, rows), (values, checkpoint_name(rows, MATMUL))


def _backward(residuals, gradients):
    values, rows = residuals
    # The barrier: what it is computed from is not computed twice, for the bound and the product.
    gradient = jax.lax.optimization_barrier(gradients[0])
    scaled = gradient.astype(jnp.float32) / rows  # exact: the scales are powers of two
    bound = jnp.abs(scaled).max(-1, keepdims=True)
    product, scale = multiply_8bit(scaled, bound, values, 0, gradient.dtype)
    return (product.astype(jnp.float32) * scale).astype(gradient.dtype), None, None


unscaled_product.defvjp(_forward, _backward)

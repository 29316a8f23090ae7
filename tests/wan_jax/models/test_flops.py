"""FLOPs counted in jaxprs, against the formulas."""

import jax
import jax.numpy as jnp
import pytest

from wan_jax.models import flops


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def scanned(w, x):
    return jax.lax.scan(lambda x, _: (x @ w, None), x, length=7)[0]


@jax.custom_vjp
def custom(a, b):
    return a @ b


custom.defvjp(lambda a, b: (a @ b, (a, b)), lambda ab, g: (g @ ab[1].T, ab[0].T @ g))
CASES = {
    "product": (lambda a, b: a @ b, (shape(3, 5), shape(5, 11)), 2 * 3 * 5 * 11),
    "batch": (
        lambda a, b: jnp.einsum("bqnh,bknh->bnqk", a, b),
        (shape(2, 3, 4, 5), shape(2, 7, 4, 5)),
        2 * 2 * 4 * 3 * 7 * 5,
    ),
    "convolution": (
        lambda x, k: jax.lax.conv_general_dilated(
            x, k, (2, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ),
        (shape(2, 8, 6, 4), shape(3, 3, 4, 10)),
        2 * (2 * 4 * 6 * 10) * 3 * 3 * 4,
    ),
    "grouped": (
        lambda x, k: jax.lax.conv_general_dilated(
            x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=4
        ),
        (shape(2, 8, 6, 4), shape(3, 3, 1, 4)),
        2 * (2 * 8 * 6 * 4) * 3 * 3,
    ),
    "scan": (scanned, (shape(5, 5), shape(3, 5)), 7 * 2 * 3 * 5 * 5),
    "remat": (
        jax.value_and_grad(lambda w, x: jax.checkpoint(lambda w, x: (x @ w) ** 2)(w, x).sum()),
        # forward, forward again, the gradient
        (shape(5, 6), shape(3, 5)),
        3 * 2 * 3 * 5 * 6,
    ),
    "custom": (custom, (shape(3, 5), shape(5, 11)), 2 * 3 * 5 * 11),
    "cond": (
        lambda a: jax.lax.cond(a[0, 0] > 0, lambda a: a @ a, lambda a: a + a, a),
        (shape(4, 4),),
        2 * 4**3,
    ),
    "element-wise": (lambda a: jnp.exp(a).sum(), (shape(4, 4),), 0),
}


@pytest.mark.parametrize("case", CASES)
def test_flops(case):
    function, args, expected = CASES[case]
    assert flops.count(jax.jit(function), *args) == expected

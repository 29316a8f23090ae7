"""Changes of weights while they are read."""

import ml_dtypes
import numpy as np
import pytest

from wan_jax.errors import UserError
from wan_jax.storage.weight_changes import Rounding, WeightChanges, product, whole

KERNEL, NORM = "blocks/to_q/kernel", "norm/scale"


@pytest.fixture
def parts():
    """(base, A, B, a change of the norm)."""
    rng = np.random.default_rng(0)
    base = {
        KERNEL: rng.standard_normal((3, 6, 4)).astype(np.float32),
        NORM: rng.standard_normal(6).astype(np.float32),
    }
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((6, 2), (2, 4)))
    return base, a, b, rng.standard_normal(6).astype(np.float32)


def changes_of(a, b, norm):
    terms = {
        KERNEL: {1: [product(a, b, 2.0), product(a, b, -0.5)]},
        NORM: {None: [whole(norm, 3.0)]},
    }
    return WeightChanges(terms)


def test_slices_are_those_of_the_sum(parts):
    base, *rest = parts
    a, b, norm = rest
    wanted = {KERNEL: base[KERNEL].copy(), NORM: base[NORM] + 3 * norm}
    wanted[KERNEL][1] += 1.5 * a @ b
    found = changes_of(*rest).applied(base)
    for path, value in wanted.items():
        np.testing.assert_allclose(found[path], value, rtol=1e-5, atol=1e-6)
    for index in (
        (slice(1, 3), slice(2, 5), slice(None)),
        (slice(None), slice(None), slice(1, 4)),
        (slice(0, 1), slice(None), slice(0, 2)),
    ):
        piece = changes_of(*rest).merge_slice(
            KERNEL, (3, 6, 4), np.float32, index, base[KERNEL].__getitem__
        )
        np.testing.assert_allclose(piece, wanted[KERNEL][index], rtol=1e-5, atol=1e-6)


def test_a_layer_without_changes_is_as_stored(parts):
    base, *rest = parts
    stored = base[KERNEL][0].astype(ml_dtypes.bfloat16)
    assert changes_of(*rest).merge(stored, KERNEL, 0, np.float32) is stored


def test_the_share_that_is_lost():
    """Half of the change's squares are missed: sqrt(1 / 2)."""
    rounding = Rounding()
    assert rounding.lost == 0
    rounding.add(np.float32([1, 1]), np.float32([1, 0]))
    rounding.add(np.float32([2, -2]), np.float32([0, -2]))
    assert rounding.lost == pytest.approx(0.5**0.5)


def test_overflow_is_an_error(parts, capsys):
    base, a, b, norm = parts
    changes = WeightChanges({NORM: {None: [whole(norm, 3e38), whole(norm, 3e38)]}})
    with np.errstate(over="ignore", invalid="ignore"):
        changes.merge(base[NORM], NORM, None, np.float32)
    with pytest.raises(UserError, match=r"x\.safetensors:3e38 gives weights beyond float32"):
        changes.report("transformer", "x.safetensors:3e38")
    changes_of(a, b, norm).report("transformer", "y")
    assert "merged y into 2 tensors" in capsys.readouterr().out

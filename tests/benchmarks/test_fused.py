"""Tests of `benchmarks.fused` on the CPU, at small shapes, with interpreted kernels."""

import functools
import json
import sys

import jax
import jax.numpy as jnp
import pytest

from benchmarks import fused
from wan_jax.models.fused import calls
from wan_jax.models.quantised import Quantisation


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(fused, "VIDEOS", 1)
    monkeypatch.setattr(fused, "TOKENS", 20)
    call = functools.partial(calls.pl.pallas_call, interpret=True)
    monkeypatch.setattr(calls.pl, "pallas_call", call)


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_every_kernel_agrees_with_the_plain_code():
    cases = fused.cases("tiny", jnp.dtype(jnp.float8_e4m3fn))
    assert {case.tile for case in cases} == set(vars(calls.TILES))
    for case in cases:
        line = fused.measure_kernel(case, repeats=1)
        # fp8: few values rounded to a neighbour; bfloat16: sums in another order
        assert line["difference"] < 0.02 and line["fused_ms"] > 0, case.name


@pytest.mark.usefixtures("small")
def test_a_tiling_is_measured_and_the_default_stays():
    default = calls.TILES
    case = fused.cases("tiny", jnp.dtype(jnp.float8_e4m3fn))[-2]
    assert case.name == "GELU"
    assert fused.measure_tile(case, calls.Tile(4, 8), repeats=1)["ms"] > 0
    assert calls.TILES is default


def test_products_without_qwix(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "qwix", None)  # an import of it fails
    x, weight = (jax.random.normal(jax.random.key(i), (64, 64)) for i in range(2))
    how = {"fp8": Quantisation("fp8", native=True), "int8": Quantisation("int8")}
    products = fused.product_cases(weight, how)
    assert "pip install qwix" in json.loads(capsys.readouterr().out)["skipped"]
    assert set(products) == {"bf16", "fp8", "int8"}
    for name, function in products.items():
        assert fused.largest_error(function(x), x @ weight) < {"fp8": 0.06, "int8": 0.02}.get(
            name, 1e-5
        )

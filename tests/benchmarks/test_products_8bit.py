"""Tests of `benchmarks.products_8bit` on the CPU, at small shapes, with the kernel interpreted."""

import functools
import json
import sys

import jax
import pytest

from benchmarks import products_8bit
from wan_jax.models import gelu_kernel
from wan_jax.models.quantised import Quantisation

pytestmark = pytest.mark.fp8


def test_the_kernel_is_compared_with_the_plain_code(monkeypatch):
    monkeypatch.setattr(products_8bit, "VIDEOS", 1)
    monkeypatch.setattr(products_8bit, "TOKENS", 20)
    call = functools.partial(gelu_kernel.pl.pallas_call, interpret=True)
    monkeypatch.setattr(gelu_kernel.pl, "pallas_call", call)
    lines, warps = [], gelu_kernel.WARPS
    products_8bit.measure_gelu("tiny", [4, 16], 1, lines.append)
    assert [line["by"] for line in lines] == ["plain", "kernel, 4 warps", "kernel, 16 warps"]
    # few values in fp8 are rounded to a neighbour
    assert all(line["ms"] > 0 and line.get("difference", 0) < 0.02 for line in lines)
    assert gelu_kernel.WARPS == warps


def test_products_without_qwix(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "qwix", None)  # an import of it fails
    x, weight = (jax.random.normal(jax.random.key(i), (64, 64)) for i in range(2))
    how = {"fp8": Quantisation("fp8", native=True), "int8": Quantisation("int8")}
    products = products_8bit.product_cases(weight, how)
    assert "pip install qwix" in json.loads(capsys.readouterr().out)["skipped"]
    assert set(products) == {"bf16", "fp8", "int8"}
    for name, function in products.items():
        limit = {"fp8": 0.06, "int8": 0.02}.get(name, 1e-5)
        assert products_8bit.largest_error(function(x), x @ weight) < limit

"""Tests of `benchmarks.quantised_latents` at a small size."""

import pytest

from benchmarks import quantised_latents, workload
from wan_jax.models import quantised

pytestmark = pytest.mark.fp8


@pytest.mark.slow
def test_errors_have_the_order_of_the_types(monkeypatch):
    monkeypatch.setattr(quantised, "SMALLEST", 0)
    inputs = quantised_latents.draw_inputs(workload.transformer_config("tiny"), (1, 4, 4, 16), 1)
    lines = []
    quantised_latents.compare("tiny", inputs, 2, lines.append)
    assert [line["weights"] for line in lines[1:]] == ["fp8", "int8", "nf4"]
    for key in ("velocity", "latents"):
        bf16, fp8, int8, nf4 = (line[key] for line in lines)
        # 3 bits after the leading one in weights and inputs; 7 bits, about those of bfloat16; 4 bits
        assert 0 < bf16 < 0.02 and 0 < int8 < 1.5 * bf16 and int8 < fp8 < nf4 < 0.1

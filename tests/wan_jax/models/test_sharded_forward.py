"""The tokens of a video split over devices: attention among them, the rows of each device, what is
sent, and what kernels see.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests.wan_jax.models.attention_cases import TOLERANCE, assert_close, computed, draw, exact
from wan_jax.distributed import mesh as mesh_lib
from wan_jax.models.sharded_forward import Layout, self_attention

TOKENS = P(mesh_lib.BATCH_AXES, "context")


def split(context: int, tokens: int, backend: str = "chunked"):
    """Attention of [B,S,N,head_dim] whose S is split over so many devices, padded to a multiple of
    them.
    """
    mesh = mesh_lib.make_mesh(devices=jax.devices()[:context], context=context)
    inside = jax.shard_map(
        functools.partial(self_attention, backend=backend, tokens=tokens),
        mesh=mesh,
        in_specs=(TOKENS,) * 3,
        out_specs=TOKENS,
        check_vma=False,
    )

    def attend(q, k, v):
        padded = (jnp.pad(x, ((0, 0), (0, -tokens % context), (0, 0), (0, 0))) for x in (q, k, v))
        return inside(*padded)[:, :tokens]

    return attend


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize(
    "context, heads, tokens", [(4, 4, 130), (4, 3, 130), (8, 8, 9), (2, 6, 64), (8, 12, 35)]
)
def test_attention_among_split_tokens_against_float64(context, heads, tokens):
    """Heads that the devices divide, and that they do not; rows to fill up, for (8, 8, 9) some
    devices' every row.
    """
    arrays = draw(tokens, tokens, "float32", heads=heads, head_dim=16)
    assert_close(computed(split(context, tokens), *arrays), exact(*arrays), TOLERANCE["float32"])


@pytest.mark.parametrize(
    "heads, kinds", [(8, {"all-to-all"}), (6, {"all-gather", "reduce-scatter"})]
)
def test_what_split_attention_sends(heads, kinds):
    mesh = mesh_lib.make_mesh(devices=jax.devices()[:4], context=4)
    x = jax.ShapeDtypeStruct((1, 64, heads, 16), jnp.float32, sharding=NamedSharding(mesh, TOKENS))
    text = (
        jax.jit(jax.grad(lambda *a: split(4, 64)(*a).sum(), argnums=(0, 1, 2)))
        .lower(x, x, x)
        .compile()
        .as_text()
    )
    assert (
        set(
            re.findall(
                r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)\(", text
            )
        )
        == kinds
    )


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("tokens, context", [(3510, 4), (32760, 8), (75600, 8), (9, 8), (1024, 1)])
def test_rows_of_each_device(tokens, context):
    layout = Layout(mesh_lib.make_mesh(devices=jax.devices()[:context], context=context))
    x = np.arange(tokens, dtype=np.float32).reshape(1, tokens, 1)

    def there_and_back(x):
        own = layout.own_tokens(x, 1)
        return own, layout.all_tokens(own, tokens)

    own, whole = jax.jit(
        jax.shard_map(
            there_and_back, mesh=layout.mesh, in_specs=P(), out_specs=(TOKENS, P()), check_vma=False
        )
    )(x)
    assert np.array_equal(whole, x) and own.shape[1] - tokens < context
    assert np.array_equal(own[:, :tokens], x) and not own[:, tokens:].any()


@pytest.mark.parametrize("backend", ["cudnn", "pallas"])
def test_kernels_see_local_arrays(monkeypatch, absent_gpu, backend):
    """40 heads over 4 devices, lowered for CUDA without a GPU: a kernel has 10 heads and all 3510
    tokens.
    """
    module = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    if not hasattr(module, "check_cudnn_version"):
        pytest.skip("this JAX checks the cuDNN version elsewhere: lowering for CUDA needs a GPU")
    monkeypatch.setattr(module, "check_cudnn_version", lambda: 91000)
    x = jax.ShapeDtypeStruct((1, 3510, 40, 128), jnp.bfloat16)
    both = jax.jit(
        jax.grad(
            lambda *a: split(4, 3510, backend)(*a).astype(jnp.float32).sum(), argnums=(0, 1, 2)
        )
    )
    calls = [
        line
        for line in both.trace(x, x, x).lower(lowering_platforms=("cuda",)).as_text().splitlines()
        if "@__cudnn$fmhaSoftmax" in line or "@__gpu$xla.gpu.triton" in line
    ]
    assert len(calls) == {"cudnn": 2, "pallas": 3}[backend]
    for call in calls:
        shapes = re.findall(r"tensor<1x(\d+)x(\d+)x128xbf16>", call)
        assert shapes and all(
            "10" in shape and 3510 <= max(map(int, shape)) <= 3584 for shape in shapes
        ), shapes

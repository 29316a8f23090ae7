"""Every attention backend against float64, at awkward lengths; its memory, its sharding and its
choice.
"""

import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests.wan_jax.models.attention_cases import TOLERANCE, assert_close, computed, draw, exact
from wan_jax.distributed import mesh
from wan_jax.models.attention import (
    attention,
    choose_backend,
    chunked,
    pallas,
    platform_of,
    repeat_keys,
)
from wan_jax.models.attention.chunked import chunk_rows, chunked_attention
from wan_jax.models.attention.pallas import Blocks, Tile, pallas_attention

# Wan's text: 64 rows and one that stands for the padding to 512
PADDED = np.array([1] * 64 + [448])
CASES = {
    "self 130": (130, 130, None),
    "self 517": (517, 517, None),
    "cross 517 to 65 counted": (517, 65, PADDED),
    "cross 130 to 517": (130, 517, None),
    "cross 7 to 130 counted": (7, 130, np.arange(1, 131)),
}
PLAIN = {
    "xla": functools.partial(attention, backend="xla"),
    "chunked": functools.partial(attention, backend="chunked"),
}
DEFAULT = Blocks()


def interpreted(q, k, v, *, key_counts=None, blocks=DEFAULT):
    bias = None if key_counts is None else jnp.log(jnp.asarray(key_counts, jnp.float32))
    return pallas_attention(q, k, v, bias, blocks=blocks, interpret=True)


@pytest.mark.quick_cases(3)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", PLAIN)
def test_plain_backends_against_float64(backend, case, dtype):
    sq, sk, counts = CASES[case]
    arrays = draw(sq, sk, dtype)
    results = computed(functools.partial(PLAIN[backend], key_counts=counts), *arrays)
    assert all(
        x.dtype == dtype and x.shape == y.shape for x, y in zip(results, (arrays[0], *arrays[:3]))
    )
    assert_close(results, exact(*arrays, counts), TOLERANCE[dtype])


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    "case, dtype, head_dim",
    [
        ("self 130", "float32", 128),
        ("cross 130 to 517", "float32", 16),
        ("cross 517 to 65 counted", "float32", 64),
        ("cross 517 to 65 counted", "bfloat16", 128),
    ],
)
def test_pallas_kernels_against_float64(case, dtype, head_dim):
    sq, sk, counts = CASES[case]
    arrays = draw(sq, sk, dtype, heads=1, head_dim=head_dim)
    results = computed(functools.partial(interpreted, key_counts=counts), *arrays)
    assert_close(results, exact(*arrays, counts), TOLERANCE[dtype])


def test_block_sizes_do_not_change_the_result():
    arrays = draw(70, 50, "float32", batch=1, heads=2, head_dim=16)
    small = computed(
        functools.partial(interpreted, blocks=Blocks(Tile(16, 32), Tile(32, 16), Tile(64, 16))),
        *arrays,
    )
    assert_close(small, exact(*arrays), TOLERANCE["float32"])


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("rows", [1, 13, 64, 130, 512])
def test_chunk_size_does_not_change_the_result(monkeypatch, rows):
    monkeypatch.setattr(chunked, "chunk_rows", lambda sq, sk: rows)
    arrays, counts = draw(130, 65, "float32"), PADDED
    bias = jnp.log(jnp.asarray(counts, jnp.float32))
    results = computed(lambda q, k, v: chunked_attention(q, k, v, bias), *arrays)
    assert_close(results, exact(*arrays, counts), TOLERANCE["float32"])


def test_chunks_are_even_and_bounded():
    for sq, sk in ((7, 7), (1024, 1024), (3510, 3510), (32760, 32760), (75600, 75600), (75600, 65)):
        rows = chunk_rows(sq, sk)
        chunks = -(-sq // rows)
        assert rows % 8 == 0 and rows * sk <= max(2**20 + 8 * sk, 128 * sk)
        assert rows * chunks - sq < 8 * chunks  # padding: less than 8 rows a chunk
    assert chunk_rows(1024, 1024) == 1024 and chunk_rows(32760, 32760) == 128


def test_logits_of_any_size_survive():
    """exp would overflow at 89 and, taken from the wrong maximum, vanish: logits here reach some
    2000.
    """
    q, k, v, d_out = draw(130, 130, "float32")
    for function in (*PLAIN.values(), interpreted):
        assert_close(
            computed(function, 30 * q, 30 * k, v, d_out)[:1],
            exact(30 * q, 30 * k, v, d_out)[:1],
            1e-4,
        )


@pytest.mark.parametrize(
    "counts, why", [([1] * 7, "8 positive"), ([1] * 7 + [0], "8 positive"), ([1.5] * 8, "8 pos")]
)
def test_key_counts_that_count_nothing_are_refused(counts, why):
    q, k, v, _ = draw(8, 8, "float32")
    with pytest.raises(ValueError, match=why):
        attention(q, k, v, backend="chunked", key_counts=np.array(counts))


def temporary_bytes(function, tokens: int) -> int:
    x = jax.ShapeDtypeStruct((1, tokens, 1, 64), jnp.float32)
    program = (
        jax.jit(jax.grad(lambda *a: function(*a).sum(), argnums=(0, 1, 2))).lower(x, x, x).compile()
    )
    return program.memory_analysis().temp_size_in_bytes


def test_memory_of_chunked_attention_is_linear():
    short, long = (temporary_bytes(PLAIN["chunked"], tokens) for tokens in (8192, 16384))
    # a single S x S buffer of fp32 would be 16 times that
    assert long < 2.2 * short and long < 16384**2 * 4 / 16
    # which this measure sees where there is one
    assert temporary_bytes(PLAIN["xla"], 8192) >= 8192**2 * 4


@pytest.mark.parametrize("name", ["chunked", "pallas"])
def test_devices_work_on_their_own_videos(name):
    """On eight devices: the results of one, and nothing sent from one to another."""
    function = functools.partial(
        {"chunked": PLAIN["chunked"], "pallas": interpreted}[name],
        key_counts=np.array([1] * 15 + [9]),
    )
    arrays = draw(24, 16, "float32", batch=8, heads=2, head_dim=16)
    sharding = NamedSharding(mesh.make_mesh(2, jax.devices()[:8]), P(mesh.AXES))
    assert len(sharding.device_set) == 8
    both = jax.jit(lambda q, k, v, d_out: jax.vjp(function, q, k, v)[1](d_out))
    program = both.lower(*(jax.device_put(x, sharding) for x in arrays)).compile()
    assert not re.findall(
        r"all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute", program.as_text()
    )
    results = program(*(jax.device_put(x, sharding) for x in arrays))
    assert all(x.sharding.is_equivalent_to(sharding, x.ndim) for x in results)
    assert_close(
        (arrays[0], *results),
        (arrays[0], *exact(*arrays, function.keywords["key_counts"])[1:]),
        5e-6,
    )


def test_pallas_gathers_what_is_split_along_the_tokens():
    arrays = draw(24, 16, "float32", batch=2, heads=2, head_dim=16)
    sharding = NamedSharding(mesh.make_mesh(2, jax.devices()[:8]), P(None, mesh.AXES))
    results = computed(interpreted, *(jax.device_put(x, sharding) for x in arrays))
    assert_close(results, exact(*arrays), TOLERANCE["float32"])


def kernel_tiles():
    return [getattr(DEFAULT, name) for name in ("forward", "keys", "queries")]


@pytest.mark.parametrize("head_dim", [64, 128])
def test_pallas_blocks_fit_into_an_mi300x(head_dim):
    assert pallas.LDS_BYTES == 65536
    assert max(tile.lds_bytes(head_dim) for tile in kernel_tiles()) <= 65536
    q = jax.ShapeDtypeStruct((1, 64, 1, head_dim), jnp.bfloat16)
    with pytest.raises(
        ValueError, match=rf"keys=Tile\(own=1024.*{1024 * head_dim * 2} bytes.*65536.*fewer rows"
    ):
        jax.eval_shape(
            functools.partial(pallas_attention, blocks=Blocks(keys=Tile(1024, 64))), q, q, q
        )


def test_pallas_lowers_for_amd_and_nvidia_to_triton_alone(absent_gpu):
    q, k = (jax.ShapeDtypeStruct((2, s, 2, 128), jnp.bfloat16) for s in (3510, 65))
    both = jax.jit(
        jax.grad(
            lambda q, k, v: (
                attention(q, k, v, backend="pallas", key_counts=PADDED).astype(jnp.float32).sum()
            ),
            argnums=(0, 1, 2),
        )
    )
    for platform in ("rocm", "cuda"):
        text = both.trace(q, k, k).lower(lowering_platforms=(platform,)).as_text()
        assert re.findall(r"custom_call @([\w.$]+)", text) == ["__gpu$xla.gpu.triton"] * 3


@pytest.mark.parametrize(
    "sq, sk, counts, seen",
    [(3510, 3510, None, (3510, 3510)), (517, 65, PADDED, (518, 512)), (130, 131, None, (130, 132))],
)
def test_cudnn_is_asked_for_even_lengths(monkeypatch, sq, sk, counts, seen):
    """Lowered for CUDA without a GPU: cuDNN's version is made up, the custom calls are read,
    nothing runs.
    """
    module = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    if not hasattr(module, "check_cudnn_version"):
        pytest.skip("this JAX checks the cuDNN version elsewhere: lowering for CUDA needs a GPU")
    monkeypatch.setattr(module, "check_cudnn_version", lambda: 91000)
    q, k = (jax.ShapeDtypeStruct((2, s, 3, 128), jnp.bfloat16) for s in (sq, sk))
    both = jax.jit(
        jax.grad(
            lambda q, k, v: (
                attention(q, k, v, backend="cudnn", key_counts=counts).astype(jnp.float32).sum()
            ),
            argnums=(0, 1, 2),
        )
    )
    calls = [
        line
        for line in both.trace(q, k, k).lower(lowering_platforms=("cuda",)).as_text().splitlines()
        if "@__cudnn$fmhaSoftmax" in line
    ]
    assert len(calls) == 2 and "Backward" in calls[1]
    for call in calls:
        operands = re.findall(
            r"tensor<2x(\d+)x3x128xbf16>", call.split(") -> (")[0].split(": (")[-1]
        )
        assert tuple(map(int, operands[:2])) == seen
        # the keys' true number
        assert ("tensor<2xi32>" in call) == (sk % 2 == 1 and counts is None)


@pytest.mark.parametrize("case", ["self 517", "cross 517 to 65 counted"])
def test_padding_and_repetition_around_cudnn(monkeypatch, case):
    """What surrounds cuDNN's call, with XLA's attention of the same signature in its place."""
    plain = jax.nn.dot_product_attention
    monkeypatch.setattr(
        jax.nn,
        "dot_product_attention",
        lambda *args, implementation, **kwargs: plain(*args, implementation="xla", **kwargs),
    )
    sq, sk, counts = CASES[case]
    arrays = draw(sq, sk, "float32")
    results = computed(functools.partial(attention, backend="cudnn", key_counts=counts), *arrays)
    assert_close(results, exact(*arrays, counts), 2e-5)  # 448 equal keys add up in fp32: 6e-6 seen


@pytest.mark.parametrize("counts", [[3], [1, 1], [1, 1, 5], [2, 1, 1, 4, 3, 1]])
def test_repeated_keys(counts):
    x = np.arange(2 * len(counts) * 6, dtype=np.float32).reshape(2, len(counts), 3, 2)
    assert np.array_equal(
        repeat_keys(jnp.asarray(x), np.array(counts)), np.repeat(x, counts, axis=1)
    )


def test_platform_tells_amd_from_nvidia():
    def device(platform, version):
        return types.SimpleNamespace(
            platform=platform, client=types.SimpleNamespace(platform_version=version)
        )

    assert platform_of(device("gpu", "PJRT C API\ncuda 13000")) == "cuda"
    assert platform_of(device("gpu", "PJRT C API\nrocm 70200")) == "rocm"
    assert platform_of(jax.devices()[0]) == "cpu"


def test_backend_choice():
    bf16, fp32 = jnp.bfloat16, jnp.float32
    assert choose_backend("auto", "cuda", bf16, 128) == "cudnn"
    for platform, dtype, head_dim in (
        ("cuda", fp32, 128),
        ("cuda", bf16, 256),
        ("rocm", bf16, 128),
        ("cpu", fp32, 24),
    ):
        assert choose_backend("auto", platform, dtype, head_dim) == "chunked"
    for platform in ("cpu", "cuda", "rocm"):
        assert [choose_backend(name, platform, fp32, 24) for name in ("xla", "chunked")] == [
            "xla",
            "chunked",
        ]
    assert (
        choose_backend("pallas", "rocm", bf16, 128)
        == choose_backend("pallas", "cuda", bf16, 64)
        == "pallas"
    )


@pytest.mark.parametrize(
    "request_, why",
    [
        (("cudnn", "cpu", jnp.bfloat16, 128), "cudnn.*'cpu', not an NVIDIA"),
        (("cudnn", "rocm", jnp.bfloat16, 128), "'rocm', not an NVIDIA"),
        (("cudnn", "cuda", jnp.float32, 128), "float32"),
        (("cudnn", "cuda", jnp.bfloat16, 256), "256"),
        (("cudnn", "cuda", jnp.bfloat16, 36), "36 is not a multiple of 8"),
        (("pallas", "cpu", jnp.bfloat16, 128), "pallas.*'cpu', not an AMD or NVIDIA"),
        (("pallas", "rocm", jnp.float32, 128), "float32.*use attention='auto', 'chunked' or 'xla'"),
        (("pallas", "rocm", jnp.bfloat16, 24), "24 is not one of 16, 32, 64, 128"),
        (("flash", "cpu", jnp.float32, 128), "flash.*auto, xla, chunked, cudnn, pallas"),
        (("auto", "gpu", jnp.bfloat16, 128), "platform_of"),
    ],
)
def test_impossible_backends_are_refused(request_, why):
    with pytest.raises(ValueError, match=why):
        choose_backend(*request_)

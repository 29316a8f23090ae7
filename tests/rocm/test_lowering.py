"""Every program of training lowers for AMD GPUs, at full size, and asks for nothing that only
NVIDIA or a host has.

Needs neither plugin nor GPU; arguments are abstract. What XLA makes of it is `test_compile`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo.compiled.functions import Functions
from grpo.compiled.program import Program
from tests.rocm.inspection import LOWERED, lowered_targets
from tests.rocm.programs import CASES, Case
from wan_jax.models.attention import choose_backend

FIRST = Case("wan2.1-1.3b", True, 1)
VIDEO = Case("wan2.1-1.3b", True, 8, True)
BACKEND = choose_backend("auto", "rocm", jnp.bfloat16, 128)


def programs(run: Functions) -> list[Program]:
    return [run.initial_noise(), run.rollout_step(), run.ode_step(), run.update(), *run.decode()]


def lower(program: Program) -> str:
    return program.jitted.trace(*program.args).lower(lowering_platforms=("rocm",)).as_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        FIRST,
        VIDEO,
        Case("wan2.1-14b", False, 8),
        Case("wan2.1-1.3b", True, 1, method="nft"),
        Case("wan2.1-14b", False, 8, method="nft"),
    ],
    ids=str,
)
def test_training_asks_for_nothing_foreign(case):
    """Each structure once: the other cases of `test_compile` differ in sizes only. What depends
    neither on the method nor on what is trained is lowered for a picture on one device and for a
    video on eight.
    """
    assert case in CASES
    run = case.run(jax.devices(), BACKEND)
    own = [run.update()] if case.method == "nft" else [run.rollout_step(), run.update()]
    for program in programs(run) if case in (FIRST, VIDEO) else own:
        text = lower(program)
        assert "stablehlo" in text and lowered_targets(text) <= LOWERED, program.name
        assert f"mhlo.num_partitions = {case.devices} " in text, program.name


@pytest.mark.slow
def test_text_encoder_asks_for_nothing_foreign():
    run = CASES[0].run(jax.devices(), BACKEND)
    assert lowered_targets(lower(run.encode_text())) <= LOWERED


@pytest.mark.slow
def test_ti2v_5b_asks_for_nothing_foreign():
    """The other VAE, of Wan 2.2, and its transformer, on videos long enough to be decoded in
    chunks.
    """
    size = {"sample.frames": 81, "sample.height": 704, "sample.width": 1280}
    run = Case("wan2.2-ti2v-5b", True, 1, True).run(jax.devices(), BACKEND, **size)
    found = programs(run)
    for program in found:
        assert lowered_targets(lower(program)) <= LOWERED, program.name
    assert [p.name for p in found[-2:]] == ["decode, first chunk", "decode, chunk"]


@pytest.mark.parametrize(
    "function, target",
    [
        (jnp.linalg.cholesky, "hipsolver_potrf_ffi"),
        (
            lambda x: jax.ffi.ffi_call(
                "cusolver_potrf_ffi", jax.ShapeDtypeStruct(x.shape, x.dtype)
            )(x),
            "cusolver_potrf_ffi",
        ),
    ],
)
def test_a_foreign_call_is_seen(function, target):
    x = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    found = lowered_targets(lower(Program("", jax.jit(function), (x,))))
    assert target in found and not found <= LOWERED


@pytest.mark.parametrize(
    "callback",
    [
        lambda x: jax.pure_callback(np.sin, jax.ShapeDtypeStruct(x.shape, x.dtype), x),
        lambda x: jax.debug.print("{}", x.sum()),
    ],
)
def test_a_host_callback_is_seen(callback):
    program = Program("", jax.jit(callback), (jax.ShapeDtypeStruct((4,), jnp.float32),))
    # JAX refuses, or we do
    with pytest.raises((ValueError, AssertionError), match=r"lowering platform rocm|callback"):
        found = lowered_targets(lower(program))
        assert found <= LOWERED, found


def test_cases_are_what_they_say():
    assert {case.devices for case in CASES} == {1, 8} and {case.lora for case in CASES} == {
        True,
        False,
    }
    for case in CASES:
        run = case.run(jax.devices(), BACKEND)
        assert run.spec.tokens == (3510 if case.video else 1024)
        state, frozen, batch, *_ = run.update().args
        adapters = any("lora" in path for path in state.trainable)
        assert adapters == case.lora and len(jax.tree.leaves(frozen)) > 0
        latents = batch.latents if case.method == "grpo" else batch.x0
        assert latents.sharding.shard_shape(latents.shape)[2 if case.method == "grpo" else 1] == 9
        method = run.spec.method
        assert method.needs_reference and bool(method.lagged) == (case.method == "nft")

"""XLA's ROCm compiler makes MI300X programs of training, which fit: ahead of time, without a GPU.

Runs where JAX's ROCm plugin is installed (scripts/test_rocm.sh). Shows neither numerics nor speed.
"""

import dataclasses
import os
import time

import jax
import jax.numpy as jnp
import pytest

from grpo.compiled import rocm_compiler
from grpo.compiled.program import Program
from tests.rocm import inspection
from tests.rocm.programs import CASES, TOO_LARGE, Case
from wan_jax.models.attention import choose_backend
from wan_jax.models.quantised import Quantisation

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(rocm_compiler.why_not() is not None, reason=str(rocm_compiler.why_not())),
]
BACKEND = choose_backend("auto", "rocm", jnp.bfloat16, 128)
LIMIT = 0.9 * rocm_compiler.MEMORY
ONE_EACH = [
    Case("wan2.1-1.3b", True, devices, video) for devices in (1, 8) for video in (False, True)
]
FP8_PRODUCT = "__cublas$lt$matmul$f8"  # XLA's name, also of hipBLASLt's products
VIDEO = Case("wan2.1-1.3b", True, 1, True)


@pytest.fixture(scope="session")
def code_objects(tmp_path_factory):
    """The folder in which XLA leaves its code objects; the plugin is loaded, and ready to compile."""
    folder = tmp_path_factory.mktemp("hsaco")
    os.environ |= {
        "TF_XLA_HSACO_CACHE_DIR": str(folder),
        "TF_XLA_HSACO_BITCODE_SIZE_THRESHOLD": "0",
    }
    rocm_compiler.load()
    # what is compiled for absent devices cannot be read back
    jax.config.update("jax_enable_compilation_cache", False)
    yield folder
    jax.config.update("jax_enable_compilation_cache", True)


@pytest.fixture(scope="session")
def compiled(code_objects, table):
    """compile(name, program) -> the executable, measured, after the checks that every program must
    pass. Each name is compiled once: of an equal program XLA would leave no second code object.
    """
    executables = {}

    def compile(name: str, program: Program):
        if name in executables:
            return executables[name]
        before = set(code_objects.iterdir())
        lowered = program.jitted.lower(*program.args)
        assert inspection.lowered_targets(lowered.as_text()) <= inspection.LOWERED
        start = time.perf_counter()
        executable = lowered.compile()
        seconds = time.perf_counter() - start
        text, memory = executable.as_text(), executable.memory_analysis()
        found = inspection.collectives(text)
        table.append(
            f"| {name} | {seconds:.1f} | {memory.argument_size_in_bytes / 1e9:.2f} | "
            f"{memory.temp_size_in_bytes / 1e9:.2f} | {needs(memory) / 1e9:.2f} | "
            f"{', '.join(f'{n} {found[n]}' for n in inspection.COLLECTIVES if found[n])} |"
        )
        assert inspection.compiled_targets(text) <= inspection.COMPILED
        new = set(code_objects.iterdir()) - before
        assert new and all(map(inspection.is_gfx942, new))
        executables[name] = executable
        return executable

    return compile


def needs(memory) -> int:
    """Bytes on a device while the program runs: arguments, results that take no argument's place,
    temporaries; XLA's own figure for the peak leaves out what its allocation of temporaries wastes.
    """
    return max(
        memory.peak_memory_in_bytes,
        memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes,
    )


def check(executable, case: Case, tokens: int, attends: bool = True):
    assert needs(executable.memory_analysis()) < LIMIT
    text = executable.as_text()
    assert bool(inspection.collectives(text)) == (case.devices > 1 and attends)
    if case.video:  # a picture's 1024 tokens may be one chunk
        assert not inspection.square_buffers(text, tokens)


# others sample alike
@pytest.mark.parametrize("case", [case for case in CASES if case.method == "grpo"], ids=str)
def test_rollout_step_compiles_and_fits(case, compiled):
    run = case.run(rocm_compiler.mi300x(case.devices), BACKEND)
    program = run.rollout_step()
    executable = compiled(f"rollout {case}", program)
    check(executable, case, run.spec.tokens)
    latents = program.args[2]
    # the next step's argument
    assert executable.output_shardings[0].is_equivalent_to(latents.sharding, latents.ndim)


@pytest.mark.parametrize("weights", ["fp8", "nf4"])
def test_quantised_weights_compile_and_fit(weights, compiled):
    """fp8 is gfx942's own, in the products too; the weights take a half and a quarter of bfloat16's
    memory.
    """
    case = Case("wan2.1-14b", True, 1)
    run = case.run(rocm_compiler.mi300x(1), BACKEND, **{"model.weights": weights})
    for name, program in (("rollout", run.rollout_step()), ("update", run.update())):
        executable = compiled(f"{name} {case} {weights}", program)
        check(executable, case, run.spec.tokens)
        text = executable.as_text()
        assert ("f8e4m3fnuz" in text) == (weights == "fp8") and "f8e4m3fn[" not in text
        if weights == "fp8":
            assert FP8_PRODUCT in text
    gigabytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(run.policy.base)) / 1e9
    assert gigabytes < {"fp8": 15, "nf4": 9}[weights]


def test_gelus_kernel_compiles(compiled, monkeypatch):
    """With fp8 in gfx942's own type. It is used on NVIDIA GPUs alone, as it has not run here."""
    choose = Quantisation.choose
    monkeypatch.setattr(
        Quantisation, "choose", lambda *where: dataclasses.replace(choose(*where), kernel=True)
    )
    case = Case("wan2.1-1.3b", True, 1)
    run = case.run(rocm_compiler.mi300x(1), BACKEND, **{"model.weights": "fp8"})
    for name, program in (("rollout", run.rollout_step()), ("update", run.update())):
        executable = compiled(f"{name} {case} fp8, kernel", program)
        check(executable, case, run.spec.tokens)
        assert "/gelu_rows/pallas_call" in executable.as_text()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_update_compiles_and_fits(case, compiled):
    run = case.run(rocm_compiler.mi300x(case.devices), BACKEND)
    program = run.update()
    executable = compiled(f"update {case}", program)
    check(executable, case, run.spec.tokens)
    after = executable.output_shardings[0]  # of the state, which is the next update's argument
    moved = [
        path
        for (path, x), sharding in zip(
            jax.tree.leaves_with_path(program.args[0]), jax.tree.leaves(after)
        )
        if not sharding.is_equivalent_to(x.sharding, x.ndim)
    ]
    assert not moved


def test_a_compact_state_is_smaller_by_all_that_it_leaves_out(compiled):
    """4 bytes of moments and 4 of average a parameter; the noise of rounding is in no array."""
    case, found = Case("wan2.1-1.3b", False, 1), []
    compact = {"train.moments_dtype": "bfloat16", "train.ema_decay": 0.0}
    for name, values in ((f"{case}", {}), (f"{case}, compact", compact)):
        run = case.run(rocm_compiler.mi300x(1), BACKEND, **values)
        found.append(compiled(f"update {name}", run.update()).memory_analysis())
    whole, small = found
    parameters = sum(x.size for x in run.policy.trainable.values())
    left_out = whole.argument_size_in_bytes - small.argument_size_in_bytes
    assert left_out == pytest.approx(8 * parameters, rel=1e-3)
    assert small.temp_size_in_bytes < whole.temp_size_in_bytes + 2 * parameters


def test_the_update_has_the_rollouts_products(compiled):
    """Where the rollout rounds a layer's result, the update does too: else the first update's ratio
    is not 1. A reference has products of its own, which must not be merged with the policy's.
    """

    def products(program: Program):
        return inspection.products(
            compiled(f"{program.name}, results kept, KL {weight}", program).as_text()
        )

    rollout, last = None, ("bf16[18432,64]", "BIAS")
    for weight, models in ((0.0, 1), (0.004, 2)):
        settings = {"model.remat": "save_matmuls", "train.kl_weight": weight}
        run = ONE_EACH[0].run(rocm_compiler.mi300x(), BACKEND, **settings)
        rollout = rollout or products(run.rollout_step())
        update = products(run.update())
        assert rollout <= update, rollout - update
        assert (rollout[last], update[last]) == (1, models)


@pytest.mark.parametrize("case", ONE_EACH, ids=str)
def test_ode_step_and_decoder_compile_and_fit(case, compiled):
    run = case.run(rocm_compiler.mi300x(case.devices), BACKEND)
    check(compiled(f"ODE step {case}", run.ode_step()), case, run.spec.tokens)
    check(compiled(f"decode {case}", run.decode()[-1]), case, run.spec.tokens, attends=False)


def test_text_encoder_compiles_and_fits(compiled):
    executable = compiled(
        "text encoder", ONE_EACH[0].run(rocm_compiler.mi300x(), BACKEND).encode_text()
    )
    assert needs(executable.memory_analysis()) < LIMIT


def test_what_cannot_fit_is_seen(compiled):
    """All weights of 14B trained on one device: two fp32 moments, the weights and their average are
    229 GB.
    """
    executable = compiled(
        f"update {TOO_LARGE} (does not fit)",
        TOO_LARGE.run(rocm_compiler.mi300x(), BACKEND).update(),
    )
    assert needs(executable.memory_analysis()) > rocm_compiler.MEMORY


@pytest.mark.parametrize("backend, dense", [("pallas", False), ("xla", True)])
def test_other_attention_compiles_and_what_is_dense_is_seen(backend, dense, compiled):
    run = VIDEO.run(rocm_compiler.mi300x(), backend)
    text = compiled(f"update {VIDEO}, attention {backend}", run.update()).as_text()
    assert bool(inspection.square_buffers(text, run.spec.tokens)) == dense


def test_a_call_of_cuda_is_refused(code_objects):
    (device,) = rocm_compiler.mi300x()
    x = jax.ShapeDtypeStruct(
        (64, 64), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(device)
    )
    call = jax.jit(
        lambda a: jax.ffi.ffi_call("cusolver_potrf_ffi", jax.ShapeDtypeStruct(a.shape, a.dtype))(a)
    )
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"cusolver_potrf_ffi on a platform ROCM"):
        call.lower(x).compile()

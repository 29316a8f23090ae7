"""The devices that `grpo.plan` plans for, which this machine need not have, and how to compile for
them."""

import dataclasses
import os

import jax

from grpo.compiled import compile, costs, device_kinds, rocm_compiler
from grpo.compiled.functions import Functions
from grpo.compiled.program import Program
from grpo.run import RunSpec
from wan_jax.distributed import memory
from wan_jax.distributed.memory import GIB
from wan_jax.errors import UserError
from wan_jax.models.attention import choose_backend, platform_of

# JAX's variable: the share of a GPU's memory that a process takes, 0.75 if unset
FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"
# Triton products are tuned on the device. Without one, untuned products may need more shared memory
# than gfx942 has.
ABSENT_ROCM = {"xla_gpu_enable_triton_gemm": False}
# XLA for the CPU computes bfloat16 products in float32 copies of whole weights and activations,
# which took 2.3 to 3.7 times the ROCm compiler's temporaries. Compiled in float32 it was 1.3 to 1.8
# times, for the update of 1.3B and 14B. It also keeps a float16 copy of all fp8 weights, which it does
# not for an H200 or an MI300X; int8 takes as many bytes, and is dequantised layer by layer.
OVERESTIMATE = 1.3, 1.8
CPU_NOTE = (
    "no compiler for this device here: an estimate from the functions in float32 as XLA compiles "
    "them for the CPU; compared with XLA's ROCm compiler it gave {} to {} times the update's "
    "temporaries".format(*OVERESTIMATE)
)


@dataclasses.dataclass(frozen=True)
class Target:
    """The devices to plan for, and how to compile for them.

    Attributes:
        kind: the kind of device; None: one with unknown rates.
        devices: the devices to compile for.
        platform: their platform, as `attention.platform_of` names it.
        limit: memory of a device in bytes; None: unknown.
        compiler: name of the compiler, for the output.
        notes: further lines of the output.
        options: compiler options.
    """

    kind: device_kinds.Kind | None
    devices: list[jax.Device]  # pyright: ignore[reportInvalidTypeForm]
    platform: str
    limit: int | None
    compiler: str
    notes: tuple[str, ...] = ()
    options: dict | None = None

    @property
    def stand_in(self) -> device_kinds.Kind | None:
        """The kind to plan for where the compiler is that of another platform, else None."""
        return self.kind if self.kind and self.kind.platform != self.platform else None


def choose_target(device: str, count: int) -> Target:
    """Return `count` devices with this name; 0: all of this machine, or one of a named kind. Raises
    `UserError` where this machine has fewer.
    """
    if device == "here":
        return _target_here(count)
    kind = device_kinds.named(device)
    assert kind.memory is not None, f"{device} has no memory in device_kinds.KINDS"
    fraction = float(os.environ.get(FRACTION, "0.75"))
    limit = int(kind.memory * fraction)
    notes = (f"limit: {fraction:g} of {kind.memory / GIB:.0f} GiB ({FRACTION})",)
    if not kind.bf16:
        notes += (f"assumed: a {kind.label} of NVIDIA, whose rates are unknown",)
    elif kind != device_kinds.KINDS["h200"]:
        notes += (f"assumed, not measured: the {kind.label} as in its vendor's data sheet",)
    if kind.platform == "rocm":
        obstacle = rocm_compiler.why_not()
        if obstacle is None:
            rocm_compiler.load()
            # the cache cannot read back functions that were compiled for absent devices
            jax.config.update("jax_enable_compilation_cache", False)
            return Target(
                kind,
                rocm_compiler.mi300x(count or 1),
                platform="rocm",
                limit=limit,
                compiler="XLA's ROCm compiler for gfx942",
                notes=notes,
                options=ABSENT_ROCM,
            )
        notes += (f"no ROCm compiler: {obstacle}",)
    notes += (CPU_NOTE,)
    simulated = jax.devices("cpu")[: count or 1]
    if len(simulated) < count:
        raise UserError(
            f"--devices={count}: XLA_FLAGS allows {len(simulated)} simulated devices; leave "
            "xla_force_host_platform_device_count out of it"
        )
    return Target(kind, simulated, "cpu", limit, "XLA for the CPU", notes)


def _target_here(count: int) -> Target:
    devices = jax.devices()
    if count > len(devices):
        raise UserError(
            f"--devices={count}: this machine has {len(devices)}; name the device to plan for with "
            "--device"
        )
    chosen = devices[: count or len(devices)]
    return Target(
        costs.kind_of(chosen[0]),
        chosen,
        platform=platform_of(chosen[0]),
        limit=memory.limit(chosen[0]),
        compiler=f"XLA for {chosen[0].device_kind}",
    )


def prepare_jax(device: str, count: int) -> None:
    """Set JAX's platform for a target that is not on this machine: the CPU, as `count` devices."""
    if device == "here":
        return
    jax.config.update("jax_platforms", "cpu")
    # otherwise the ROCm plugin logs that it found no GPU
    jax.config.update("jax_logging_level", "CRITICAL")
    simulated = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if count and not simulated:
        jax.config.update("jax_num_cpu_devices", count)


def compiled_backend(
    setting: str, target: Target, dtype, head_dim: int
) -> tuple[str, tuple[str, ...]]:
    """Return (the attention backend to compile, notes): the target's, or chunked attention where
    the target's cannot be compiled on this machine.
    """
    if target.stand_in is None:
        return choose_backend(setting, target.platform, dtype, head_dim), ()
    wanted = choose_backend(setting, target.stand_in.platform, dtype, head_dim)
    if wanted in ("xla", "chunked"):
        return wanted, ()
    return "chunked", (
        f"attention {wanted} cannot be compiled here; chunked attention is compiled instead, whose "
        "memory is linear in the tokens as well",
    )


def measure(program: Program, stand_in: Program, target: Target) -> compile.Measured:
    """Return the memory of a function: temporaries of the stand-in as compiled, data of `program`."""
    return dataclasses.replace(
        compile.measure(stand_in, target.options), data=compile.data_bytes(program)
    )


def verdict(needed: compile.Memory, run: RunSpec, offload: bool, target: Target) -> str:
    """Return whether a run fits, in words: "" where it does; else why not, and how sure that is. offload:
    whether the idle one of two experts is in host memory.
    """
    try:
        compile.check_fits(needed, run, offload, target.limit)
        return ""
    except UserError as error:
        why = str(error)
    if target.stand_in is not None:
        programs = [
            dataclasses.replace(each, work=int(each.work / OVERESTIMATE[1]))
            for each in needed.programs
        ]
        try:
            least = dataclasses.replace(needed, programs=tuple(programs))
            compile.check_fits(least, run, offload, target.limit)
            return (
                "may not fit: by this estimate it does not, with the temporaries of a GPU's own compiler it "
                f"may (--device=here where the GPU is). {why[0].upper()}{why[1:]}"
            )
        except UserError:
            pass
    return f"does not fit: {why}"


def compilable(functions: Functions, target: Target) -> Functions:
    """Return the functions to compile: `functions`, or in float32, and with int8 weights instead of
    fp8, where XLA for the CPU stands in for the target's compiler (`CPU_NOTE`).
    """
    return functions if target.stand_in is None else for_the_cpu(functions)


def for_the_cpu(functions: Functions) -> Functions:
    """Return functions whose memory, compiled for the CPU, is an estimate of that on a GPU."""
    weights = functions.spec.recipe.model.weights
    weights = "int8" if weights == "fp8" else weights
    spec = functions.spec.changed(model={"dtype": "float32", "weights": weights})
    return dataclasses.replace(functions, spec=spec)

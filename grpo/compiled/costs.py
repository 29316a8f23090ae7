"""What an epoch costs in seconds, estimated: FLOPs of the programs, peak rates of data sheets,
measured shares of them.

The scores are not in it: they are read on the host, beside the next batch's sampling, and depend on
the CPU. Steps that a group shares (`sample.shared_noise`) are not taken off.
"""

import dataclasses
import os

import jax
import jax.numpy as jnp

from grpo.compiled.functions import Functions, Program
from grpo.compiled.rocm_compiler import MEMORY as MI300X_MEMORY
from grpo.run import RunSpec
from wan_jax.distributed.memory import GIB
from wan_jax.models import flops


@dataclasses.dataclass(frozen=True)
class Kind:
    """One device: dense rates without sparsity, FLOP/s."""

    label: str
    platform: str  # of `attention.platform_of`
    memory: int | None  # bytes; None: not a device's own
    bf16: float
    # of fp32 products as XLA runs them by default: TF32 on NVIDIA, fp32 matrix cores on AMD
    fp32: float


KINDS = {
    "h100": Kind("H100", "cuda", 79 * GIB, 989e12, 495e12),
    "h200": Kind("H200", "cuda", 139 * GIB, 989e12, 495e12),
    "mi300x": Kind("MI300X", "rocm", MI300X_MEMORY, 1307e12, 163e12),
}
# a core, from docs/results.md: the quickstart's 64 pictures on 2 cores, 0.85 TFLOP of sampling in
# 3.5 s
CPU = Kind("CPU", "cpu", None, 0.12e12, 0.12e12)


@dataclasses.dataclass(frozen=True)
class Efficiency:
    """Shares of the peak rate, FLOPs of the model counted once: rematerialisation is not work."""

    rollout: float
    update: float  # of three forward passes, and one of the reference where there is KL
    decode: float
    source: str


# docs/results.md, "Beside the PyTorch stack", pictures on one H200, of 989 TFLOP/s, with the dense
# layers' results kept and with blocks computed again; and those of "Every model at full size": 18
# decoded, 20 TFLOP, in 0.1 s
MEASURED = {
    ("1.3B", "kept"): (0.44, 0.48),
    ("1.3B", "again"): (0.46, 0.44),
    ("14B", "kept"): (0.57, 0.72),
    ("14B", "again"): (0.58, 0.58),
}  # rollout, update
DECODE = 0.4
ON_CPU = Efficiency(1.0, 0.85, 0.7, "measured with the quickstart on 2 cores")


def kind_of(device: jax.Device) -> Kind | None:
    """None where the device is not in `KINDS`."""
    if device.platform == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return dataclasses.replace(CPU, bf16=CPU.bf16 * cores, fp32=CPU.fp32 * cores)
    return next((kind for kind in KINDS.values() if kind.label in device.device_kind.upper()), None)


def default_efficiency(run: RunSpec, kind: Kind) -> Efficiency:
    if kind.platform == "cpu":
        return ON_CPU
    model = "14B" if run.preset.transformer.width >= 5120 else "1.3B"
    results = "kept" if run.remat in ("none", "save_matmuls") else "again"
    assumed = "" if kind.label == "H200" else f", assumed to hold on {kind.label}"
    return Efficiency(
        *MEASURED[model, results], DECODE, f"measured on an H200 with Wan 2.1 {model}{assumed}"
    )


@dataclasses.dataclass(frozen=True)
class Work:
    """FLOPs over all devices."""

    sample: float  # of an epoch
    decode: float
    update: float
    eval_sample: float  # of an evaluation
    eval_decode: float


def work(functions: Functions) -> Work:
    """Count the FLOPs in the jaxprs, with dense attention, whose products are the model's whatever
    the backend.
    """
    spec = dataclasses.replace(functions.spec, backend="xla")
    functions = dataclasses.replace(functions, spec=spec)
    batches, experts = spec.settings.batches, range(len(spec.preset.experts))
    # the reference is in the step's function, but rarely run
    branches = 2 if spec.method.sampling_kl else 1
    forward = [count(functions.rollout_step(i)) / branches for i in experts]
    sample = sum(len(segment.steps) * forward[segment.expert] for segment in spec.segments)
    trained = sum(
        spec.method.rollout_passes(spec, i) * spec.trained_steps(i) * forward[i]
        for i in spec.trained_experts
    )
    steps, unguided = spec.recipe.eval.steps, bool(functions.unguided_steps)
    evaluation = max(count(functions.ode_step(i)) for i in experts) * steps
    evaluation += count(functions.unguided_step()) * steps if unguided else 0
    eval_decode = decode_flops(functions, spec.eval_shape) * (1 + unguided)
    return Work(
        sample=batches * sample,
        decode=batches * decode_flops(functions, spec.shape),
        update=spec.method.passes * trained,
        eval_sample=spec.eval_batches * evaluation,
        eval_decode=spec.eval_batches * eval_decode,
    )


def decode_flops(functions: Functions, shape: tuple[int, ...]) -> float:
    """Return the FLOPs of decoding a batch, as if whole: chunks do the same work."""
    return count(functions.decode_whole(shape))


def count(program: Program) -> float:
    return flops.count(program.jitted, *program.args)


def seconds(functions: Functions, kind: Kind, efficiency: Efficiency) -> dict[str, float]:
    """Of an epoch's stages and of one evaluation."""
    # simulated devices share the cores
    spec, w = functions.spec, work(functions)
    devices = 1 if kind.platform == "cpu" else spec.mesh.size
    rate = devices * (kind.bf16 if jnp.dtype(spec.settings.dtype).itemsize == 2 else kind.fp32)
    decode = devices * kind.fp32 * efficiency.decode
    return {
        "sample": w.sample / rate / efficiency.rollout,
        "decode": w.decode / decode,
        "update": w.update / rate / efficiency.update,
        "evaluation": w.eval_sample / rate / efficiency.rollout + w.eval_decode / decode,
    }

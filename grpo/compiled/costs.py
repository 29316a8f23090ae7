"""Estimates the seconds of an epoch and of an evaluation: FLOPs of the jitted functions, peak rates
of data sheets, and measured shares of them.

Scoring is not included: it runs on the host while the next batch is sampled, and depends on the
CPU. Steps that a group shares (`sample.shared_noise`) are not subtracted.
"""

import dataclasses
import os

import jax
import jax.numpy as jnp

from grpo import run as run_lib
from grpo.compiled import device_kinds
from grpo.compiled.device_kinds import Kind
from grpo.compiled.functions import Functions
from grpo.compiled.program import Program
from grpo.learning.data_loss import data_rows
from grpo.run import RunSpec
from grpo.settings import video_sizes
from grpo.settings.video_sizes import Size
from wan_jax.models import flops

# Of one core, from docs/results.md: 64 pictures in 10 steps with guidance, as configs/tiny_ocr.py had
# then, 0.85 TFLOP of sampling in 3.5 s on 2 cores.
CPU = Kind("CPU", "cpu", None, 0.12e12, 0.12e12)


@dataclasses.dataclass(frozen=True)
class Efficiency:
    """Shares of the peak rate that each stage reaches. FLOPs of the model are counted once:
    rematerialisation is not counted.

    Attributes:
        rollout: of sampling.
        update: of three forward passes, and one of the reference where there is a KL.
        decode: of the VAE, as a share of the fp32 rate.
        source: of the shares, for the output.
    """

    rollout: float
    update: float
    decode: float
    source: str


# (rollout, update) by model, by whether the results of dense layers are kept or blocks are
# rematerialised, and by whether the base is multiplied in 8 bits. From docs/results.md, the comparison
# with the PyTorch stack: pictures on one H200, of 989 TFLOP/s, also for fp8.
MEASURED = {
    ("1.3B", "kept", False): (0.44, 0.48),
    ("1.3B", "rematerialised", False): (0.46, 0.44),
    ("14B", "kept", False): (0.57, 0.72),
    ("14B", "rematerialised", False): (0.58, 0.58),
    ("1.3B", "kept", True): (0.55, 0.52),
    ("1.3B", "rematerialised", True): (0.53, 0.46),
    ("14B", "kept", True): (0.89, 0.94),
    ("14B", "rematerialised", True): (0.89, 0.80),
}
# From docs/results.md, "Every model at full size": 18 pictures decoded, 20 TFLOP, in 0.1 s.
DECODE = 0.4
ON_CPU = Efficiency(1.0, 0.85, 0.7, "measured with tiny-wan on 2 cores")


def kind_of(device: jax.Device) -> Kind | None:  # pyright: ignore[reportInvalidTypeForm]
    """Return the kind of a device; None where its rates are unknown."""
    if device.platform == "cpu":
        cores = os.cpu_count() or 1
        if hasattr(os, "sched_getaffinity"):
            cores = len(os.sched_getaffinity(0))
        return dataclasses.replace(CPU, bf16=CPU.bf16 * cores, fp32=CPU.fp32 * cores)
    return device_kinds.matching(device.device_kind)


def default_efficiency(run: RunSpec, kind: Kind) -> Efficiency:
    """Return the measured shares for the size of a run's model, on an H200 or on the CPU."""
    if kind.platform == "cpu":
        return ON_CPU
    model = "14B" if run.preset.transformer.width >= 5120 else "1.3B"
    results = "kept" if run.remat in ("none", "save_matmuls") else "rematerialised"
    fp8 = run.recipe.model.weights == "fp8" and kind.fp8
    rollout, update = MEASURED[model, results, fp8]
    assumed = "" if kind.label == "H200" else f", assumed to hold on {kind.label}"
    source = f"measured on an H200 with Wan 2.1 {model}{' in fp8' if fp8 else ''}{assumed}"
    return Efficiency(rollout, update, DECODE, source)


@dataclasses.dataclass(frozen=True)
class Work:
    """FLOPs over all devices: of an epoch's sampling, decoding and update, and of an evaluation's
    sampling and decoding.
    """

    sample: float
    decode: float
    update: float
    eval_sample: float
    eval_decode: float


def work(functions: Functions) -> Work:
    """Count the FLOPs of an epoch and of an evaluation in the jaxprs, with dense attention, which
    has the model's products whatever the backend.
    """
    spec = dataclasses.replace(functions.spec, backend="xla")
    functions = dataclasses.replace(functions, spec=spec)
    batches, experts = spec.settings.batches, range(len(spec.preset.experts))
    # rollout: the step with a KL contains the reference, which rarely runs
    branches = 2 if spec.method.sampling_kl else 1
    forward = [count(functions.rollout_step(i)) / branches for i in experts]
    sample = sum(len(segment.steps) * forward[segment.expert] for segment in spec.segments)
    # update: forward passes of the trained steps
    sampled = not spec.recipe.data.only
    trained = sum(
        spec.method.rollout_passes(spec, i) * spec.trained_steps(i) * forward[i]
        for i in spec.trained_experts
        if sampled
    )
    # evaluation: all steps by the expert with more FLOPs, and again without guidance
    steps, unguided = spec.recipe.eval.steps, bool(functions.unguided_steps)
    evaluation = max(count(functions.ode_step(i)) for i in experts) * steps
    if unguided:
        evaluation += count(functions.unguided_step()) * steps
    eval_decode = decode_flops(functions, spec.eval_shape) * (1 + unguided)
    return Work(
        sample=sampled * batches * sample,
        decode=sampled * batches * decode_flops(functions, spec.shape),
        update=spec.method.passes * trained + data_flops(functions),
        eval_sample=spec.eval_batches * evaluation,
        eval_decode=spec.eval_batches * eval_decode,
    )


def data_flops(functions: Functions) -> float:
    """Return the FLOPs of the data in the updates of an epoch."""
    spec, kind = functions.spec, functions.spec.data_kind
    if kind is None:
        return 0.0
    size = Size(kind.frames, kind.height, kind.width, spec.recipe.sample.shift)
    like = spec.of_sizes(size, size).changed(sample={"guidance": 1.0, "guidance_2": None})
    branches = 2 if spec.method.sampling_kl else 1
    step = Functions(like, functions.text_rows).rollout_step(spec.trained_experts[0])
    return data_passes(spec) * count(step) / branches


def data_passes(spec: RunSpec) -> float:
    """Return the cost of the data in the updates of an epoch, in forward passes of a rollout batch
    without guidance. The loss on data needs the policy; with data.only also the other models of its method.
    """
    if spec.data_kind is None:
        return 0.0
    updates = spec.recipe.train.updates_per_epoch * len(spec.trained_experts)
    passes = 3
    if spec.recipe.data.only:
        passes = spec.method.passes * (2 if spec.method.pairs else 1)
    return updates * passes * data_rows(spec) / spec.recipe.sample.batch_size


def epochs_in_evaluations(spec: RunSpec) -> float:
    """Return the mean cost of an epoch in evaluations, by the forward passes of both and the tokens of
    their videos, without tracing anything. Decoding and scoring are assumed to grow in proportion.
    """
    sizes, judged = spec.trained_sizes, spec.evaluated_sizes[0]
    if len(sizes) == 1:
        return epoch_in_evaluations(spec)
    cost = {size: epoch_in_evaluations(spec.of_sizes(size, judged)) for size in sizes}
    epochs = range(1, spec.recipe.epochs + 1)
    return sum(cost[video_sizes.at(epoch, spec.recipe.sample)] for epoch in epochs) / len(epochs)


def epoch_in_evaluations(spec: RunSpec) -> float:
    """Return the cost of an epoch of a run with one size of videos, in evaluations."""
    branches = [1 + (guidance > 1) for guidance in spec.sampling_guidance]
    sample = spec.settings.batches * sum(
        len(segment.steps) * branches[segment.expert] for segment in spec.segments
    )
    update = spec.method.passes * sum(
        spec.method.rollout_passes(spec, i) * spec.trained_steps(i) * branches[i]
        for i in spec.trained_experts
        if not spec.recipe.data.only
    )
    guided = [1 + (guidance > 1) for guidance in spec.eval_guidance]
    evaluation = sum(len(segment.steps) * guided[segment.expert] for segment in spec.eval_segments)
    evaluation += spec.recipe.eval.steps * spec.recipe.eval.also_unguided
    tokens = run_lib.tokens(spec.eval_shape)
    epoch = 0.0 if spec.recipe.data.only else (sample + update) * spec.tokens
    if spec.data_shape is not None:
        epoch += data_passes(spec) * run_lib.tokens(spec.data_shape)
    return epoch / (spec.eval_batches * evaluation * tokens)


def decode_flops(functions: Functions, shape: tuple[int, ...]) -> float:
    """Return the FLOPs of decoding a batch of whole videos with latents (F, H, W, C). Decoding in
    chunks has the same.
    """
    return count(functions.decode_whole(shape))


def count(program: Program) -> float:
    """Return the FLOPs of a function."""
    return flops.count(program.jitted, *program.args)


def seconds(functions: Functions, kind: Kind, efficiency: Efficiency) -> dict[str, float]:
    """Return the estimated seconds of an epoch's stages and of an evaluation, by name: 'sample',
    'decode', 'update', 'evaluation'.
    """
    spec, total = functions.spec, work(functions)
    devices = 1 if kind.platform == "cpu" else spec.mesh.size  # simulated devices share the cores
    rate = devices * (kind.bf16 if jnp.dtype(spec.settings.dtype).itemsize == 2 else kind.fp32)
    decode = devices * kind.fp32 * efficiency.decode
    return {
        "sample": total.sample / rate / efficiency.rollout,
        "decode": total.decode / decode,
        "update": total.update / rate / efficiency.update,
        "evaluation": total.eval_sample / rate / efficiency.rollout + total.eval_decode / decode,
    }

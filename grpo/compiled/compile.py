"""Compiles the functions of a run before any weight is read, reports the memory that they need, and
refuses a run that does not fit.

A jitted function that was lowered and compiled for abstract arguments is not compiled again when it
is called with such arguments: JAX's own caches have it in this process, and the persistent cache
(`wan_jax.command_line.cli`) in the next one. `CompileCounter` checks this in training.
"""

import collections
import dataclasses
import math
import time
from collections.abc import Callable, Mapping

import jax

from grpo.compiled.functions import Functions
from grpo.compiled.program import Program
from grpo.run import RunSpec
from wan_jax.choices import SMALLER_WEIGHTS
from wan_jax.distributed import mesh as mesh_lib
from wan_jax.distributed.memory import GIB, PINNED
from wan_jax.distributed.offload import choose_offload
from wan_jax.errors import UserError

# JAX's event of a compilation, or of a function read from the persistent cache
COMPILED = "/jax/core/compile/backend_compile_duration"


@dataclasses.dataclass(frozen=True)
class Measured:
    """The time to compile one function, and its memory on one device in bytes.

    Attributes:
        name: of the function.
        seconds: to lower and compile it.
        work: temporaries, and results that do not reuse the memory of a donated argument.
        data: batches, trajectories and other arrays that are on the device while it runs, but not
            throughout training.
    """

    name: str
    seconds: float
    work: int
    data: int


@dataclasses.dataclass(frozen=True)
class Memory:
    """The memory that training needs, in bytes.

    Attributes:
        resident: on the fullest device throughout training, by content.
        programs: the compiled functions.
        host: pinned host memory for each device, by content.
    """

    resident: dict[str, int]
    programs: tuple[Measured, ...]
    host: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def resident_total(self) -> int:
        """Bytes that are on the device throughout training."""
        return sum(self.resident.values())

    def peak(self, program: Measured) -> int:
        """Return the bytes on the device while a function runs."""
        return self.resident_total + program.work + program.data

    @property
    def largest(self) -> Measured:
        """The function with the highest peak."""
        return max(self.programs, key=self.peak)

    def table(self, limit: int | None) -> list[str]:
        """Return the lines of a table, in GiB. limit: memory of a device in bytes; None: unknown."""
        lines = [
            f"memory of a device, GiB: {format_gib(self.resident, digits=2)}",
            f"  {'function':<32} {'compile s':>9} {'batches':>8} {'work':>8} {'peak':>8}",
        ]
        lines += [
            f"  {program.name:<32} {program.seconds:>9.1f} {program.data / GIB:>8.2f} "
            f"{program.work / GIB:>8.2f} {self.peak(program) / GIB:>8.2f}"
            for program in self.programs
        ]
        peak, known = self.peak(self.largest), "a device that states no limit"
        if limit:
            known = f"{limit / GIB:.2f} GiB ({100 * peak / limit:.0f} %)"
        lines.append(f"  peak {peak / GIB:.2f} GiB in the {self.largest.name}, of {known}")
        if self.host:
            pinned = format_gib(self.host, digits=2)
            lines.append(f"pinned memory of the host for each device, GiB: {pinned}")
        return lines


def format_gib(sizes: Mapping[str, int], digits: int) -> str:
    """Return sizes in bytes as 'name GiB, name GiB, ...'."""
    return ", ".join(f"{name} {size / GIB:.{digits}f}" for name, size in sizes.items())


def device_bytes(tree) -> int:
    """Return the bytes of a tree of abstract arrays on one device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape) if x.sharding else x.shape) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
        if isinstance(x, jax.ShapeDtypeStruct)
    )


def data_bytes(program: Program) -> int:
    """Return the bytes that are on a device while a function runs, but not throughout training."""
    return device_bytes(program.args[program.resident :]) + device_bytes(program.extra)


def offloads(functions: Functions, limit: int | None) -> bool:
    """Return whether the idle one of two experts is offloaded to host memory, on devices with
    `limit` bytes.
    """
    spec = functions.spec
    return choose_offload(
        spec.recipe.model.offload,
        len(spec.preset.experts),
        device_bytes(functions.params(functions.policy.base)),
        limit,
    )


def resident_bytes(functions: Functions, offload: bool) -> dict[str, int]:
    """Return the bytes that are on a device throughout training, by content. offload: whether the
    idle one of two experts is in host memory.
    """
    spec, state = functions.spec, functions.state
    experts, trained = len(spec.preset.experts), len(spec.trained)
    state_name, on_device = "trained weights, optimiser, average", state
    if spec.recipe.train.offload_optimiser:
        state_name, on_device = "trained weights", (functions.trainable, state.lagged)
    untrained = device_bytes(functions.trainable) * (experts - trained)
    return {
        "frozen weights": device_bytes(functions.frozen) * (1 if offload else experts),
        state_name: device_bytes(on_device) * trained + untrained,
        "VAE": device_bytes(functions.vae[1]),
    }


def pinned_bytes(functions: Functions, offload: bool) -> dict[str, int]:
    """Return the bytes of pinned host memory for each device, by content. offload: whether the idle
    one of two experts is in host memory.
    """
    spec, state = functions.spec, functions.state
    optimiser = device_bytes((state.opt, state.ema)) * len(spec.trained)
    experts = device_bytes(functions.frozen) * len(spec.preset.experts)
    sizes = {
        "optimiser, average": optimiser if spec.recipe.train.offload_optimiser else 0,
        "both experts": experts if offload else 0,
    }
    return {name: size for name, size in sizes.items() if size}


def measure(program: Program, compiler_options: dict | None = None) -> Measured:
    """Compile a function, and return its time and memory."""
    start = time.monotonic()
    memory = program.jitted.lower(*program.args).compile(compiler_options).memory_analysis()
    work = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Measured(program.name, time.monotonic() - start, work, data_bytes(program))


def compile_all(functions: Functions, offload: bool, progress: Callable = lambda x: x) -> Memory:
    """Compile all functions of a run for its mesh, and return the memory that they need.

    offload: whether the idle one of two experts is in host memory. progress: wraps the list of
    functions, to show a progress bar.
    """
    return Memory(
        resident_bytes(functions, offload),
        tuple(measure(program) for program in progress(functions.programs())),
        pinned_bytes(functions, offload),
    )


def check_fits(
    memory: Memory, run: RunSpec, offload: bool, limit: int | None, host_limit: int | None = None
) -> None:
    """Raise `UserError` where training does not fit, with need, limit and the settings that would
    change it.

    offload: whether the idle one of two experts is in host memory. limit: bytes of a device.
    host_limit: bytes of pinned host memory for each device. None: unknown.
    """
    if host_limit is not None:
        check_host_fits(memory, run, host_limit)
    largest = memory.largest
    if limit is None or memory.peak(largest) <= limit:
        return
    sizes = memory.resident | {"batches": largest.data, "temporaries and results": largest.work}
    raise UserError(
        f"this run needs {memory.peak(largest) / GIB:.1f} GiB on each device, in the "
        f"{largest.name} ({format_gib(sizes, digits=1)}), and a device has {limit / GIB:.1f} GiB. "
        + " ".join(remedies(run, offload))
    )


def check_host_fits(memory: Memory, run: RunSpec, limit: int) -> None:
    """Raise `UserError` where pinned host memory of `limit` bytes for each device is too little."""
    needed = sum(memory.host.values())
    if needed <= limit:
        return
    train = run.recipe.train
    remedy, smaller = "", list[str]()
    if train.offload_optimiser:
        remedy = ", or leave the optimiser on the devices: --config.train.offload_optimiser=False"
        smaller = smaller_states(train)
    raise UserError(
        f"this run needs {needed / GIB:.1f} GiB for each device in pinned host memory "
        f"({format_gib(memory.host, digits=1)}), and may take {limit / GIB:.1f} GiB, its share of "
        f"this host's; {PINNED} in the environment changes that. Use more devices with "
        f"--config.mesh.fsdp={run.mesh.shape['fsdp']}, on more hosts, or a host with more "
        + " ".join([f"memory{remedy}.", *smaller])
    )


def remedies(run: RunSpec, offload: bool) -> list[str]:
    """Return the sentences about settings that would lower the memory, without those in use."""
    recipe, devices, shards = run.recipe, run.mesh.size, mesh_lib.batch_shards(run.mesh)
    batch, fsdp, full = recipe.sample.batch_size, run.mesh.shape["fsdp"], run.settings.lora is None
    sentences = []
    if batch > shards:
        sentences.append(
            f"Lower --config.sample.batch_size={batch}, which is {batch // shards} videos a device."
        )
    if run.remat == "block":
        sentences.append("Set --config.model.remat=offload.")
    elif run.remat != "offload":
        sentences.append("Set --config.model.remat=block, or offload.")
    if not full and (smaller := SMALLER_WEIGHTS[recipe.model.weights]):
        names = ", or ".join(smaller)
        sentences.append(f"Store the base in fewer bits: --config.model.weights={names}.")
    if fsdp < devices:
        sentences.append(f"Raise --config.mesh.fsdp={fsdp} up to the {devices} devices.")
    if full and not recipe.train.offload_optimiser:
        sentences.append("Set --config.train.offload_optimiser=True.")
        sentences += smaller_states(recipe.train)
    if len(run.preset.experts) > 1 and not offload:
        sentences.append("Set --config.model.offload=always.")
    if full:
        sentences.append("Train adapters instead of all weights: --config.lora.rank=32.")
    return [
        *sentences,
        "Lower sample.frames, height or width, or use more devices with --config.mesh.fsdp. On a "
        "GPU that runs nothing else, XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 gives JAX more than its "
        "usual three quarters.",
    ]


def smaller_states(train) -> list[str]:
    """Return the sentences about settings with which the optimiser's state takes less. train: the
    recipe's section.
    """
    sentences = []
    if train.moments_dtype == "float32":
        sentences.append("Set --config.train.moments_dtype=bfloat16.")
    if train.ema_decay:
        sentences.append("Evaluate the weights themselves: --config.train.ema_decay=0.")
    return sentences


class CompileCounter:
    """Records which functions XLA compiled, or read from the persistent cache.

    Attributes:
        names: of these functions since the last `clear`.
        seconds: that this took.
    """

    def __init__(self):
        self.names: list[str] = []
        self.seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **metadata: str | int) -> None:
        if event == COMPILED:
            self.names.append(str(metadata.get("fun_name", "")))
            # JAX measures it by the system clock, which may have been set back
            self.seconds += max(0.0, duration_secs)

    def clear(self) -> None:
        """Forget the functions and the seconds."""
        self.names.clear()
        self.seconds = 0.0

    def warning(self, epoch: int) -> str | None:
        """Return a warning about an epoch in which nothing should have been compiled, or None."""
        if not self.names:
            return None
        counts = collections.Counter(self.names)
        names = ", ".join(f"{name} x {count}" for name, count in counts.items())
        return (
            f"warning: epoch {epoch} compiled again: {names}. Shapes or shardings changed after "
            "the first epoch, which costs time in every such epoch"
        )

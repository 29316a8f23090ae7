"""Training's programs compiled before any weight is read: what they need of a device, and whether
they fit.

A jitted function that was lowered and compiled for the very arguments it is called with later does
not compile again, in this process by JAX's own caches, in the next one by the persistent cache
(`wan_jax.command_line.cli`). `CompileCounter` watches that it is so.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence

import jax

from grpo.compiled.functions import Functions, Program
from grpo.run import RunSpec
from wan_jax.distributed import mesh as mesh_lib
from wan_jax.distributed.memory import GIB, PINNED
from wan_jax.distributed.offload import choose_offload
from wan_jax.errors import UserError

# JAX's event, also where the persistent cache had the program
COMPILED = "/jax/core/compile/backend_compile_duration"


@dataclasses.dataclass(frozen=True)
class Measured:
    """One compiled program, bytes of a device."""

    name: str
    seconds: float  # to lower and compile
    work: int  # temporaries, and results that take no argument's place
    data: int  # what else lies there while it runs and not throughout: batches, trajectories


@dataclasses.dataclass(frozen=True)
class Memory:
    """What training needs of the fullest device, and of its host for each device, in bytes."""

    stays: dict[str, int]  # there throughout
    programs: tuple[Measured, ...]
    host: dict[str, int] = dataclasses.field(default_factory=dict)  # pinned

    @property
    def base(self) -> int:
        return sum(self.stays.values())

    def peak(self, program: Measured) -> int:
        return self.base + program.work + program.data

    @property
    def largest(self) -> Measured:
        return max(self.programs, key=self.peak)

    def table(self, limit: int | None) -> list[str]:
        """Lines of text, in GiB. limit: the device's bytes, None: unknown."""
        lines = [
            "memory of a device, GiB: "
            + ", ".join(f"{k} {v / GIB:.2f}" for k, v in self.stays.items()),
            f"  {'program':<32} {'compile s':>9} {'batches':>8} {'work':>8} {'peak':>8}",
        ]
        lines += [
            f"  {p.name:<32} {p.seconds:>9.1f} {p.data / GIB:>8.2f} {p.work / GIB:>8.2f} "
            f"{self.peak(p) / GIB:>8.2f}"
            for p in self.programs
        ]
        peak = self.peak(self.largest)
        known = (
            f"{limit / GIB:.2f} GiB ({100 * peak / limit:.0f} %)"
            if limit
            else "a device that states no limit"
        )
        lines.append(f"  peak {peak / GIB:.2f} GiB in the {self.largest.name}, of {known}")
        if self.host:
            lines.append(
                "pinned memory of the host for each device, GiB: "
                + ", ".join(f"{k} {v / GIB:.2f}" for k, v in self.host.items())
            )
        return lines


def device_bytes(tree) -> int:
    """Bytes that a tree of abstract arrays takes on one device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape) if x.sharding else x.shape) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
        if isinstance(x, jax.ShapeDtypeStruct)
    )


def data_bytes(program: Program) -> int:
    """What lies on a device while the program runs and not throughout."""
    return device_bytes(program.args[program.stay :]) + device_bytes(program.beside)


def offloads(functions: Functions, limit: int | None) -> bool:
    """Return whether the idle one of two experts is offloaded to host memory, on devices of `limit`
    bytes.
    """
    spec = functions.spec
    return choose_offload(
        spec.recipe.model.offload,
        len(spec.preset.experts),
        device_bytes(functions.params(functions.policy.base)),
        limit,
    )


def what_stays(functions: Functions, offload: bool) -> dict[str, int]:
    """Return the bytes that are on a device from the first epoch to the last."""
    spec, state = functions.spec, functions.state
    experts, trained = len(spec.preset.experts), len(spec.trained)
    # the optimiser's state and the average are offloaded to host memory
    alone = spec.recipe.train.offload_optimiser
    on_device = (functions.trainable, state.lagged) if alone else state
    return {
        "frozen weights": device_bytes(functions.frozen) * (1 if offload else experts),
        "trained weights" if alone else "trained weights, optimiser, average": (
            device_bytes(on_device) * trained
            + device_bytes(functions.trainable) * (experts - trained)
        ),
        "VAE": device_bytes(functions.vae[1]),
    }


def what_waits(functions: Functions, offload: bool) -> dict[str, int]:
    """Return the bytes of pinned host memory that a device needs."""
    spec, state = functions.spec, functions.state
    optimiser = device_bytes((state.opt, state.ema)) * len(spec.trained)
    experts = device_bytes(functions.frozen) * len(spec.preset.experts)
    parts = {
        "optimiser, average": optimiser if spec.recipe.train.offload_optimiser else 0,
        "both experts": experts if offload else 0,
    }
    return {name: size for name, size in parts.items() if size}


def measure(program: Program, compiler_options: dict | None = None) -> Measured:
    """Compiles the program."""
    start = time.monotonic()
    m = program.jitted.lower(*program.args).compile(compiler_options).memory_analysis()
    work = m.temp_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
    return Measured(program.name, time.monotonic() - start, work, data_bytes(program))


def compile_all(functions: Functions, offload: bool, progress: Callable = lambda x: x) -> Memory:
    """Compile all of a run's functions for its mesh, and return what they need."""
    return Memory(
        what_stays(functions, offload),
        tuple(measure(program) for program in progress(functions.programs())),
        what_waits(functions, offload),
    )


def check_fits(
    memory: Memory, run: RunSpec, offload: bool, limit: int | None, host_limit: int | None = None
):
    """Raises `UserError` where training cannot fit, naming need, limit and the settings that would
    change it.

    limit: bytes of a device, host_limit: of pinned host memory for it; None: not known.
    """
    if host_limit is not None and (needed := sum(memory.host.values())) > host_limit:
        parts = ", ".join(f"{k} {v / GIB:.1f}" for k, v in memory.host.items())
        raise UserError(
            f"this run keeps {needed / GIB:.1f} GiB for each device in pinned host memory "
            f"({parts}), and may take {host_limit / GIB:.1f} GiB, its share of this host's; "
            f"{PINNED} in the environment changes that. Use more devices with "
            f"--config.mesh.fsdp={run.mesh.shape['fsdp']}, on more hosts, or a host with more "
            "memory"
            + (
                ", or leave the optimiser on the devices: --config.train.offload_optimiser=False"
                if run.recipe.train.offload_optimiser
                else ""
            )
            + "."
        )
    largest = memory.largest
    if limit is None or memory.peak(largest) <= limit:
        return
    parts = memory.stays | {"batches": largest.data, "temporaries and results": largest.work}
    raise UserError(
        f"this run needs {memory.peak(largest) / GIB:.1f} GiB on each device, in the "
        f"{largest.name} ("
        + ", ".join(f"{k} {v / GIB:.1f}" for k, v in parts.items())
        + f"), and a device has {limit / GIB:.1f} GiB. "
        + " ".join(remedies(run, offload))
    )


def remedies(run: RunSpec, offload: bool) -> Sequence[str]:
    """What would lower the need of memory and is not done yet."""
    c, devices, shards = run.recipe, run.mesh.size, mesh_lib.batch_shards(run.mesh)
    found = []
    if c.sample.batch_size > shards:
        found.append(
            f"Lower --config.sample.batch_size={c.sample.batch_size}, which is "
            f"{c.sample.batch_size // shards} videos a device."
        )
    if run.remat != "offload":
        found.append(
            "Set --config.model.remat=offload."
            if run.remat == "block"
            else "Set --config.model.remat=block, or offload."
        )
    if run.mesh.shape["fsdp"] < devices:
        found.append(
            f"Raise --config.mesh.fsdp={run.mesh.shape['fsdp']} up to the {devices} devices."
        )
    if not c.train.offload_optimiser and run.settings.lora is None:
        found.append("Set --config.train.offload_optimiser=True.")
    if len(run.preset.experts) > 1 and not offload:
        found.append("Set --config.model.offload=always.")
    if run.settings.lora is None:
        found.append("Train adapters instead of all weights: --config.lora.rank=32.")
    return [
        *found,
        "Lower sample.frames, height or width, or use more devices with --config.mesh.fsdp. On a "
        "GPU that runs nothing else, XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 gives JAX more than its "
        "usual three quarters.",
    ]


class CompileCounter:
    """Names of the programs that XLA compiled, or read from the persistent cache, since `clear`,
    and the seconds.
    """

    def __init__(self):
        self.names: list[str] = []
        self.seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration: float, fun_name: str = "", **_):
        if event == COMPILED:
            self.names.append(fun_name)
            # JAX takes it from the clock, which may have been set
            self.seconds += max(0.0, duration)

    def clear(self):
        self.names.clear()
        self.seconds = 0.0

    def warning(self, epoch: int) -> str | None:
        """For an epoch that should have compiled nothing."""
        if not self.names:
            return None
        names = ", ".join(f"{n} x {self.names.count(n)}" for n in dict.fromkeys(self.names))
        return (
            f"warning: epoch {epoch} compiled again: {names}. Shapes or shardings changed after "
            "the first epoch, which costs time in every such epoch"
        )

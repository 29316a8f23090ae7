"""Which transformer makes which denoising step, and where its weights lie.

Wan 2.2 A14B has two transformers of one configuration: steps with timestep >= boundary x 1000
belong to `transformer`, the later ones to `transformer_2` (Diffusers' `WanPipeline`). All other
models have one. Timesteps fall, so an expert's steps stand together: a sampler runs segment by
segment, all its batches through one before the next, and the weights change places once a segment.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np
from flax import nnx

from wan_jax.choices import OFFLOAD


@dataclasses.dataclass(frozen=True)
class Segment:
    expert: int  # index into the model's experts
    steps: range  # of the schedule


def segments(timesteps: np.ndarray, boundary: float | None) -> tuple[Segment, ...]:
    """The schedule's steps by expert; an expert without a step is left out. timesteps [T], falling,
    0..1000.
    """
    if boundary is None:
        return (Segment(0, range(len(timesteps))),)
    high = int(np.sum(np.asarray(timesteps) >= boundary * 1000))  # falling: the first ones
    parts = Segment(0, range(high)), Segment(1, range(high, len(timesteps)))
    return tuple(part for part in parts if part.steps)


def guidances(first: float, second: float | None, experts: int) -> tuple[float, ...]:
    """Each expert's guidance scale. As in `WanPipeline`, the first decides whether there is
    guidance at all, and the second defaults to the first.
    """
    if experts == 1:
        return (first,)
    return first, (first if second is None or first <= 1 else second)


def per_guidance(make: Callable, scales: Sequence[float]) -> tuple:
    """make(scale) for each expert, made once for equal scales, so that experts share the compiled
    program.
    """
    made = {scale: make(scale) for scale in dict.fromkeys(scales)}
    return tuple(made[scale] for scale in scales)


class Weights:
    """The experts' frozen arrays: `weights(i)` is expert i's state, on the device.

    With offload, states live in host memory (pinned where the backend has it) and only the one
    asked for last is on the device: asking for another deletes it first, also for callers that
    still hold it.
    """

    def __init__(self, loaders: Sequence[Callable[[], nnx.State]], offload: bool):
        """loaders: one function an expert, called once, that returns its state on the device."""
        self.offload = offload
        self.current: tuple[int, nnx.State] | None = None
        self.states: list = []
        for load in loaders:
            state = load()
            self.shardings = jax.tree.map(lambda x: x.sharding, state)
            self.states.append(jax.block_until_ready(to_host(state)) if offload else state)
            del state

    def __call__(self, expert: int) -> nnx.State:
        if not self.offload:
            return self.states[expert]
        if self.current is None or self.current[0] != expert:
            if self.current is not None:
                for x in jax.tree.leaves(self.current[1]):
                    x.delete()
            self.current = expert, jax.device_put(self.states[expert], self.shardings)
        return self.current[1]


def to_host(tree):
    """The tree in host memory: pinned, sharded as it was, where the backend can; NumPy arrays
    elsewhere.
    """

    def place(x):
        kinds = {
            memory.kind
            for device in x.sharding.device_set
            for memory in device.addressable_memories()
        }
        if "pinned_host" in kinds:
            return jax.device_put(x, x.sharding.with_memory_kind("pinned_host"))
        return np.asarray(x)

    return jax.tree.map(place, tree)


def choose_offload(setting: str, experts: int, expert_bytes: int, limit: int | None) -> bool:
    """'auto' offloads when two experts' weights would take more than half of the device's memory.

    expert_bytes: one expert's bytes on one device; limit: the bytes of one (`memory.limit`), None:
    unknown. Raises ValueError on an unknown setting.
    """
    if setting not in OFFLOAD:
        raise ValueError(f"offload={setting!r} is unknown; choose one of {', '.join(OFFLOAD)}")
    if experts == 1 or setting == "never":
        return False
    return setting == "always" or (limit is not None and experts * expert_bytes > limit / 2)

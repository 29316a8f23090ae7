"""The frozen weights of the experts, on the device or in host memory."""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from flax import nnx

from wan_jax.choices import OFFLOAD


class Weights:
    """The frozen arrays of each expert: `weights(i)` is the state of expert i, on the device.

    With offload, all states are in host memory (pinned where the backend has it) and only the one
    requested last is on the device. Requesting another one first deletes its arrays, even if a
    caller still has a reference to them.
    """

    def __init__(self, loaders: Sequence[Callable[[], nnx.State]], offload: bool):
        """loaders: one function per expert, called once, that returns its state on the device."""
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

    def free(self) -> None:
        """Delete all arrays, on the device and in host memory."""
        for x in jax.tree.leaves((self.current, self.states)):
            if isinstance(x, jax.Array):
                x.delete()
        self.current, self.states = None, []


def to_host(tree):
    """Copy a tree of arrays to host memory: pinned and with the same sharding where the backend has
    pinned memory, as NumPy arrays elsewhere.
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
    """Return whether the experts are offloaded. 'auto': when the weights of two experts take more
    than half of the device's memory.

    expert_bytes: bytes of one expert on one device; limit: memory of one device in bytes
    (`memory.limit`), None if unknown. Raises ValueError on an unknown setting.
    """
    if setting not in OFFLOAD:
        raise ValueError(f"offload={setting!r} is unknown; choose one of {', '.join(OFFLOAD)}")
    if experts == 1 or setting == "never":
        return False
    return setting == "always" or (limit is not None and experts * expert_bytes > limit / 2)

"""The random streams of a run: every draw is a function of the seed and of what it is for.

Host streams seed NumPy generators with [seed, epoch, number, ...]. Key streams are folded into the
run's JAX key. The last two are reserved indices inside the key of an epoch, larger than any
denoising step or video number, so no draw of the rollout coincides with them.
"""

import enum

import jax
import numpy as np

LARGEST = 2**31 - 1


class Stream(enum.Enum):
    """(where the number enters, the number)."""

    PROMPT_ORDER = ("host", 0x960)
    SDE_WINDOW = ("host", 0x5DE)
    GROUP_STEP = ("host", 0x150)
    NOISE_LEVEL = ("host", 0xF0A)
    REWARD_HEAD = ("host", 0x4EAD)

    ADAPTERS = ("key", 0)  # initial LoRA factors of the first expert
    ROLLOUT = ("key", 1)
    SECOND_ADAPTERS = ("key", 2)  # those of the second expert

    INITIAL_NOISE = ("step", LARGEST)  # x_T of a video, as if it were drawn at this step
    RENOISING = ("video", LARGEST)  # noise of the methods that train on finished videos

    @property
    def index(self) -> int:
        return self.value[1]

    def generator(self, seed: int, epoch: int | None = None, *rest: int) -> np.random.Generator:
        """Return a host stream's generator for an epoch, or for the whole run where it is None."""
        assert self.value[0] == "host", self
        epochs = [] if epoch is None else [epoch]
        return np.random.default_rng([seed, *epochs, self.index, *rest])

    def key(self, key: jax.Array) -> jax.Array:
        """Return the stream's key under `key`: the run's, or an epoch's for reserved indices."""
        assert self.value[0] != "host", self
        return jax.random.fold_in(key, self.index)

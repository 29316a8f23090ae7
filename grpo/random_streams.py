"""The random streams of a run: every draw is a function of the seed and of its purpose.

Host streams seed NumPy generators with [seed, epoch, number, ...]. Key streams are folded into the
JAX key of the run. Within the key of an epoch, which is that of ROLLOUT with the epoch folded in, the
noise of a denoising step has the key (number of the video, number of the step), whether the step is
trained or not (`grpo.rollout.sample_noise`). The last three streams are reserved indices there. They are
larger than the number of any denoising step or video, so that no draw of the rollout is equal to
theirs.
"""

import enum

import jax
import numpy as np

LARGEST = 2**31 - 1


class Stream(enum.Enum):
    """A stream: (the place where its number is used, its number)."""

    PROMPT_ORDER = ("host", 0x960)
    SDE_WINDOW = ("host", 0x5DE)
    GROUP_STEP = ("host", 0x150)
    NOISE_LEVEL = ("host", 0xF0A)
    REWARD_HEAD = ("host", 0x4EAD)
    DATA_ORDER = ("host", 0xDA7A)  # of a pass over the data, instead of the epoch
    DATA_LEVEL = ("host", 0xDA1E)  # of an optimiser step, instead of the epoch

    ADAPTERS = ("key", 0)  # initial LoRA factors of the first expert
    ROLLOUT = ("key", 1)
    SECOND_ADAPTERS = ("key", 2)  # those of the second expert
    DATA_NOISE = ("key", 3)  # with the number of the optimiser step folded in
    HEAD_REFIT = ("key", 4)  # with the number of the reward head's update folded in

    INITIAL_NOISE = ("step", LARGEST)  # x_T of a video, drawn as the noise of this step
    PROBES = ("video", LARGEST - 1)  # noise of the probes of confidence
    RENOISING = ("video", LARGEST)  # noise of the methods that train on finished videos

    @property
    def index(self) -> int:
        """The number of the stream."""
        return self.value[1]

    def generator(self, seed: int, epoch: int | None = None, *rest: int) -> np.random.Generator:
        """Return the generator of a host stream for an epoch, or for the run where `epoch` is None.
        rest: further numbers that select the draw.
        """
        assert self.value[0] == "host", self
        epochs = [] if epoch is None else [epoch]
        return np.random.default_rng([seed, *epochs, self.index, *rest])

    def key(self, key: jax.Array) -> jax.Array:
        """Return the key of the stream. key: of the run, or of an epoch for reserved indices."""
        assert self.value[0] != "host", self
        return jax.random.fold_in(key, self.index)

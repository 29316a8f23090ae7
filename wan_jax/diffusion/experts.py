"""Which transformer computes which denoising step, and with which guidance scale.

Wan 2.2 A14B has two transformers ("experts") of one configuration: steps with timestep >= boundary
x 1000 belong to `transformer`, later ones to `transformer_2` (Diffusers' `WanPipeline`). All other
models have one. Timesteps decrease, so the steps of an expert are contiguous: a sampler runs
segment by segment, all batches through one expert before the next, and the weights are swapped once
a segment (`wan_jax.distributed.offload`).
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float


@dataclasses.dataclass(frozen=True)
class Segment:
    """Consecutive denoising steps of one expert."""

    expert: int  # index into the experts of the model
    steps: range  # indices into the schedule


def segments(timesteps: Float[np.ndarray, " T"], boundary: float | None) -> tuple[Segment, ...]:
    """Split the steps of a schedule by expert, and leave out an expert without steps.

    timesteps: decreasing, on the 0..1000 scale. boundary: see the module's docstring; None for a
    model with one transformer.
    """
    if boundary is None:
        return (Segment(0, range(len(timesteps))),)
    high_noise = int(np.sum(np.asarray(timesteps) >= boundary * 1000))  # decreasing: the first ones
    both = Segment(0, range(high_noise)), Segment(1, range(high_noise, len(timesteps)))
    return tuple(segment for segment in both if segment.steps)


def guidances(first: float, second: float | None, experts: int) -> tuple[float, ...]:
    """Return the guidance scale of each expert.

    As in `WanPipeline`, the first scale decides whether there is guidance at all, and the second
    defaults to the first.
    """
    if experts == 1:
        return (first,)
    return first, (first if second is None or first <= 1 else second)


def per_guidance(make: Callable, scales: Sequence[float]) -> tuple:
    """Return make(scale) for each expert, called once for equal scales, so that experts with the
    same guidance share one jitted function.
    """
    made = {scale: make(scale) for scale in dict.fromkeys(scales)}
    return tuple(made[scale] for scale in scales)

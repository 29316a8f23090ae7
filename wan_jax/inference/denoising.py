"""The loop over denoising steps, expert by expert."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp

from wan_jax.diffusion.experts import Segment
from wan_jax.diffusion.guidance import TextBatch
from wan_jax.diffusion.solvers import SolverState


def advance(
    steps: Sequence[Callable],
    arrays: Callable,
    segments: Sequence[Segment],
    solver,
    batches: Iterable[tuple[jax.Array | SolverState, TextBatch]],
) -> Iterator[SolverState]:
    """Yield the solver state of each batch after the segments, as `pipeline.sample_ode`, whose arguments
    these are. A batch may begin with a state instead of noise, for segments that are not the first; steps
    take its buffers.
    """
    states: dict[int, SolverState] = {}  # of batches between two segments
    for segment in segments:
        jax.block_until_ready(states)
        weights = arrays(segment.expert)
        for b, (start, text) in enumerate(batches):
            if b in states:
                state = states.pop(b)
            else:
                begun = isinstance(start, SolverState)
                state = start if begun else solver.init(jnp.copy(start))
            for i in segment.steps:
                state = steps[segment.expert](weights, state, i, text)
            if segment is segments[-1]:
                yield state
            else:
                states[b] = state

"""Noise schedules: the sigmas that the sampler visits, and the timestep that the model receives at
each of them.

Rectified flow: x_s = (1 - s) x0 + s * noise, so s = 1 is pure noise and s = 0 the sample. A
schedule runs from about 1 down to exactly 0; T denoising steps use T + 1 sigmas. Everything here is
NumPy on the host, computed in float64 and stored as float32: a schedule is a constant of the
compiled functions.

Three lists are in use for Wan, and they differ at every step, so results must state which one they
used:

    flow_sigmas(..., 'diffusers')  UniPCMultistepScheduler of Diffusers >= 0.37 (January 2026); the
                                   default
    flow_sigmas(..., 'legacy')     Diffusers <= 0.36 and the official Wan code; to compare with
                                   published numbers
    euler_sigmas(...)              FlowMatchEulerDiscreteScheduler
"""

import dataclasses
import math

import numpy as np
from jaxtyping import Float32

from wan_jax.choices import SCHEDULES

TRAIN_TIMESTEPS = 1000


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """The noise levels of T denoising steps.

    Attributes:
        sigmas: strictly decreasing; the last one is 0.
        timesteps: inputs of the model, 0..1000; whole numbers for UniPC, fractions for Euler.
    """

    sigmas: Float32[np.ndarray, " T+1"]
    timesteps: Float32[np.ndarray, " T"]

    @property
    def num_steps(self) -> int:
        """T, the number of denoising steps."""
        return len(self.timesteps)


def flow_sigmas(num_steps: int, shift: float, version: str = "diffusers") -> Schedule:
    """Return UniPC's flow sigmas: s = k u / (1 + (k - 1) u) with shift k and u linear; timesteps
    are int(1000 s), truncated.

    'diffusers': u runs from 1 to 1/1000, and s_0 = 1 is lowered by 1e-6 because the solver needs
    log(1 - s_0). 'legacy': u runs from 0.999 to 0. In both, the last of the T + 1 points is
    replaced by s_T = 0. Raises ValueError on num_steps out of 1..1000, a shift that is not positive and
    finite, or an unknown version.
    """
    _check(num_steps, shift)
    if version not in SCHEDULES:
        raise ValueError(f"version={version!r} is unknown; choose one of {', '.join(SCHEDULES)}")
    u = np.linspace(1.0, 1.0 / TRAIN_TIMESTEPS, num_steps + 1)  # [T+1]
    if version == "legacy":
        u = (1.0 - u)[::-1]
    sigmas = _shifted(u[:-1], shift)  # [T]
    if version == "diffusers":
        sigmas[0] -= 1e-6
    timesteps = np.trunc(sigmas * TRAIN_TIMESTEPS)
    return _schedule(sigmas, timesteps, num_steps, shift)


def euler_sigmas(num_steps: int, shift: float) -> Schedule:
    """Return FlowMatchEuler's sigmas: shifted twice, so s_{T-1} is not near 1/1000; timesteps are
    1000 s, not rounded.

    The Diffusers class shifts its training grid once to find the smallest sigma, takes T equally
    spaced sigmas down to it, and shifts those again. Raises ValueError as `flow_sigmas` does.
    """
    _check(num_steps, shift)
    # The class computes its first grid and its timesteps in float32: that rounding is part of the
    # list.
    largest, smallest = (
        float(_shifted(np.float32(u), shift)) for u in (1.0, 1.0 / TRAIN_TIMESTEPS)
    )
    grid = np.linspace(largest * TRAIN_TIMESTEPS, smallest * TRAIN_TIMESTEPS, num_steps)  # [T]
    sigmas = _shifted(grid / TRAIN_TIMESTEPS, shift)
    timesteps = sigmas.astype(np.float32) * np.float32(TRAIN_TIMESTEPS)
    return _schedule(sigmas, timesteps, num_steps, shift)


def _shifted(u, shift):
    return shift * u / (1.0 + (shift - 1.0) * u)


def _check(num_steps, shift):
    if not 1 <= num_steps <= TRAIN_TIMESTEPS:
        raise ValueError(
            f"num_steps={num_steps}: a schedule has from 1 step to {TRAIN_TIMESTEPS}, the number of "
            "timesteps that Wan is trained with; usual are 10 to 50"
        )
    if not (shift > 0 and math.isfinite(shift)):
        raise ValueError(
            f"shift={shift}: must be positive and finite; usual: 3 (480p), 5 (720p), 12 (A14B)"
        )


def _schedule(sigmas, timesteps, num_steps, shift):
    sigmas = np.append(sigmas, 0.0).astype(np.float32)  # [T+1]
    if not np.all(np.diff(sigmas) < 0):
        raise ValueError(
            f"num_steps={num_steps} with shift={shift} gives sigmas that float32 cannot tell "
            "apart; lower the shift or the number of steps"
        )
    return Schedule(sigmas, timesteps.astype(np.float32))

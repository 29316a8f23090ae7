"""The values of the rollout's schedule for each step, with its noise and its weight in the loss."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from grpo.settings.choices import CREDITS
from wan_jax.diffusion import sde
from wan_jax.diffusion.schedule import Schedule
from wan_jax.diffusion.solvers import DPMSolverPP2M


@dataclasses.dataclass(frozen=True)
class StepTable:
    """The values of the schedule for each step.

    Attributes:
        timestep, sigma, sigma_next: fp32 [T].
        g: fp32 [T], noise coefficient of the step where it is stochastic.
        weight: fp32 [T], weight of the step in the loss (`step_credit`); None: 1.
        preserving: whether the mean of a stochastic step is that of CPS.
        dpm: fp32 [T, 3], `DPMSolverPP2M.table` where the deterministic steps are that solver's;
            None: they are Euler's.
    """

    timestep: np.ndarray
    sigma: np.ndarray
    sigma_next: np.ndarray
    g: np.ndarray
    weight: np.ndarray | None = None
    preserving: bool = False
    dpm: np.ndarray | None = None

    @classmethod
    def make(
        cls,
        schedule: Schedule,
        config: sde.SDEConfig,
        credit: str = "none",
        trained: Sequence[range] = (),
        ode_solver: str = "euler",
    ) -> "StepTable":
        """Return the table of a schedule.

        config: of the stochastic steps. credit, trained: kind and steps of `step_credit`. ode_solver:
        of the deterministic steps, 'euler' or 'dpmpp_2m'.
        """
        return cls(
            timestep=np.asarray(schedule.timesteps, np.float32),
            sigma=schedule.sigmas[:-1],
            sigma_next=schedule.sigmas[1:],
            g=sde.diffusion_coefficient(config, schedule),
            weight=step_credit(credit, schedule, config, trained),
            preserving=config.preserving,
            dpm=DPMSolverPP2M(schedule).table if ode_solver == "dpmpp_2m" else None,
        )

    def at(self, i) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Return (timestep, sigma, sigma_next, g) of step i, which may be traced, fp32 [] each; of
        steps [B], fp32 [B] each.
        """
        return (
            jnp.asarray(self.timestep)[i],
            jnp.asarray(self.sigma)[i],
            jnp.asarray(self.sigma_next)[i],
            jnp.asarray(self.g)[i],
        )


def step_credit(
    kind: str, schedule: Schedule, config: sde.SDEConfig, trained: Sequence[range]
) -> np.ndarray | None:
    """Return the weight of each step in the loss, fp32 [T]. It is None for 'none', and for 'otca',
    where weights differ between videos (`advantages.step_importance`).

    trained: the steps of each trained expert that may be stochastic; (): all steps, of one expert.

    'longcat': w = sqrt(s / (1 - s)) / sqrt(-dt), which cancels the factor sqrt(-dt (1 - s) / s) in
    the gradient of flow_sde's log-prob (LongCat-Video). In the first step the divisor has s_1, as in
    `sde.diffusion_coefficient`.

    'rectified': w = 1 / c divided by its mean over the expert's `trained` steps: Flash-GRPO's temporal
    gradient rectification (arXiv 2605.15980). The gradient of a step's log-prob with respect to v is
    z |d mean / d v| / std with z ~ N(0, 1), so c = |d mean / d v| / std = sqrt(-dt) / g +
    g sqrt(-dt) (1 - s) / (2 s) for all forms but CPS. On flow_sde, 1 / c equals 'longcat' up to a
    factor. The published divisor is the mean over the rows of an update, which are of one expert. Ours
    is constant, and equal to it where the rows are spread evenly over the expert's trained steps.
    Steps that are not trained have no rows; their weight is not divided.

    'noise_over_step': w = g / sqrt(-dt), of the policy loss alone, as in scripts/train_wan2_1.py of
    Flow-GRPO at 32b48fd (`* sigma_t / dt`, where its dt is a root). It is the first term of 1 / c:
    w c = 1 + g^2 (1 - s) / (2 s). The KL has no weight there (`LossConfig.kl_weighted`). The
    revision 74db691 has no such factor.

    Raises ValueError on an unknown kind.
    """
    if kind not in CREDITS:
        raise ValueError(f"credit={kind!r} is unknown; choose one of {', '.join(CREDITS)}")
    if kind in ("none", "otca"):
        return None
    s = schedule.sigmas.astype(np.float64)
    root = np.sqrt(-np.diff(s))  # [T]
    if kind == "longcat":
        return (np.sqrt(s[:-1] / (1.0 - np.append(s[1], s[1:-1]))) / root).astype(np.float32)
    g = sde.diffusion_coefficient(config, schedule)
    if kind == "noise_over_step":
        return (g / root).astype(np.float32)
    weight = g * root / sde.mean_slope(config, schedule)
    for steps in trained or [range(len(weight))]:
        if steps:
            weight[steps] /= np.mean(weight[steps])
    return weight.astype(np.float32)

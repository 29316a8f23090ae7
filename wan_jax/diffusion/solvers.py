"""ODE solvers over a `Schedule`: Euler, UniPC-2 and DPM-Solver++(2M), as pure functions of (state,
step index, velocity).

The model predicts the velocity v = noise - x0. All solvers have one interface, so the sampling loop
does not depend on which one it runs, and the step index may be traced (`jax.lax.scan`,
`fori_loop`):

    solver = make_solver("unipc", num_steps=50, shift=3.0)
    state = solver.init(noise)
    for i in range(solver.schedule.num_steps):
        state = solver.step(state, i, velocity(state.x, solver.schedule.timesteps[i]))
    sample = state.x

States and arithmetic are fp32 whatever the dtype of the velocity.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Float32, Int

from wan_jax.choices import SOLVERS
from wan_jax.diffusion.schedule import Schedule, euler_sigmas, flow_sigmas

# One value for all videos of a batch, or one for each.
PerVideo = Float[ArrayLike, ""] | Float[Array, " B"] | Float[np.ndarray, " B"]
StepIndex = int | Int[ArrayLike, ""]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SolverState:
    """The current sample x, and the earlier values that a multistep solver needs: (x_last, m1, m2)
    for UniPC, (m1,) for DPM-Solver++.
    """

    x: Float32[Array, " B *latent"]
    history: tuple[Float32[Array, " B *latent"], ...] = ()


def per_sample(value: PerVideo, x: Float[Array, " B *latent"]) -> Float32[Array, "..."]:
    """Return `value` as fp32 in a shape that broadcasts against x: [] or [B, 1, ..., 1]."""
    value = jnp.asarray(value, jnp.float32)
    return value.reshape(value.shape + (1,) * (x.ndim - 1)) if value.ndim else value


def euler_step(
    x: Float[Array, " B *latent"],
    velocity: Float[Array, " B *latent"],
    sigma: PerVideo,
    sigma_next: PerVideo,
) -> Float32[Array, " B *latent"]:
    """Return x + (sigma_next - sigma) v."""
    dt = per_sample(sigma_next, x) - per_sample(sigma, x)
    return x.astype(jnp.float32) + velocity.astype(jnp.float32) * dt


@dataclasses.dataclass(frozen=True, eq=False)
class Euler:
    """First-order integration of dx/dsigma = v: on `flow_sigmas` the deterministic step of
    Flow-GRPO, on `euler_sigmas` Diffusers' FlowMatchEulerDiscreteScheduler.
    """

    schedule: Schedule

    def init(self, x: Float[Array, " B *latent"]) -> SolverState:
        """Return the state before the first step; x: the initial noise."""
        return SolverState(x.astype(jnp.float32))

    def step(
        self, state: SolverState, i: StepIndex, velocity: Float[Array, " B *latent"]
    ) -> SolverState:
        """Return the state after step i, given the velocity at its x."""
        sigmas = jnp.asarray(self.schedule.sigmas)  # [T+1]
        return SolverState(euler_step(state.x, velocity, sigmas[i], sigmas[i + 1]))


@dataclasses.dataclass(frozen=True, eq=False)
class UniPC:
    """UniPC (Zhao et al., arXiv 2302.04867) with data prediction, B(h) = expm1 ("bh2"), the
    corrector at every step but the first, and order 1 at both ends: Diffusers'
    UniPCMultistepScheduler as Wan configures it.

    Works on m_i = x - s_i v, the predicted clean sample at step i. Each step first corrects x with
    the new m_i (UniC), then predicts the next x from it (UniP). All coefficients depend on the
    schedule only, see `unipc_coefficients`. Raises ValueError on an order other than 1 or 2, and on
    a schedule that starts at sigma >= 1 (log(1 - 1) is infinite).
    """

    schedule: Schedule
    order: int = 2
    table: Float32[np.ndarray, "T 7"] = dataclasses.field(init=False, repr=False)

    def __post_init__(self):
        object.__setattr__(self, "table", unipc_coefficients(self.schedule.sigmas, self.order))

    def init(self, x: Float[Array, " B *latent"]) -> SolverState:
        """Return the state before the first step; x: the initial noise."""
        x = x.astype(jnp.float32)
        # three separate buffers, so that a loop may donate the state
        return SolverState(x, tuple(jnp.zeros_like(x) for _ in range(3)))

    def step(
        self, state: SolverState, i: StepIndex, velocity: Float[Array, " B *latent"]
    ) -> SolverState:
        """Return the state after step i, given the velocity at its x."""
        # m1, m2: clean samples predicted 1 and 2 steps ago
        x, (x_last, m1, m2) = state.x, state.history
        keep_c, base_c, old_c, new_c, keep_p, base_p, old_p = jnp.asarray(self.table)[i]
        # m0: the clean sample predicted now, from the uncorrected x
        m0 = x - jnp.asarray(self.schedule.sigmas)[i] * velocity.astype(jnp.float32)
        corrected = keep_c * x_last + base_c * m1 + old_c * (m2 - m1) + new_c * (m0 - m1)
        x = jnp.where(i == 0, x, corrected)
        x_next = keep_p * x + base_p * m0 + old_p * (m1 - m0)
        return SolverState(x_next, (x, m0, m1))


def unipc_coefficients(
    sigmas: Float32[np.ndarray, " points"], order: int = 2
) -> Float32[np.ndarray, "points-1 7"]:
    """Return the weights of each UniPC step, computed in float64 from the T + 1 float32 sigmas.

    For an interval from s to s': l = log((1 - s) / s), h = l' - l, B = expm1(-h), keep = s' / s,
    base = -(1 - s') B, and at order 2, with l- of the point before s, rk = (l- - l) / h.

        Columns 0-3, corrector over the last interval:
            x <- keep x_last + base m1 + old (m2 - m1) + new (m0 - m1)
            order 1:  old = 0,  new = base / 2
            order 2:  old = base rho0 / rk,  new = base rho1,  where  rho0 + rho1 = b1,  rk rho0 + rho1 = b2,
                      b1 = (B/(-h) - 1) / B,  b2 = 2 ((B/(-h) - 1)/(-h) - 1/2) / B
        Columns 4-6, predictor over the next interval:
            x' = keep x + base m0 + old (m1 - m0)
            order 1:  old = 0
            order 2:  old = base / (2 rk)

    The last interval ends at s' = 0 with h infinite: B = -1, keep = 0 and order 1 give x' = m0
    exactly.
    """
    if order not in (1, 2):
        raise ValueError(f"order={order}: UniPC order 1 or 2 is supported; Wan uses 2")
    s = sigmas.astype(np.float64)
    if s[0] >= 1:
        raise ValueError(
            f"sigma_0={s[0]}: UniPC needs sigma_0 < 1; use flow_sigmas, it starts below 1"
        )
    num_steps = len(s) - 1
    log_snr = np.append(np.log1p(-s[:-1]) - np.log(s[:-1]), np.inf)  # [T+1], l in the docstring
    table = np.zeros((num_steps, 7))
    for i in range(num_steps):
        if i > 0:
            table[i, :4] = _corrector(s, log_snr, i, p=min(order, i))
        table[i, 4:] = _predictor(s, log_snr, i, p=min(order, num_steps - i, i + 1))
    return table.astype(np.float32)


def _corrector(s, log_snr, i, p):
    """Return columns 0-3 of row i at order p; s and log_snr [T+1] in float64."""
    h = log_snr[i] - log_snr[i - 1]
    B = np.expm1(-h)
    base = -(1 - s[i]) * B
    old, new = 0.0, 0.5
    if p == 2:
        rk = (log_snr[i - 2] - log_snr[i - 1]) / h
        first = B / -h - 1
        b1, b2 = first / B, 2 * (first / -h - 0.5) / B
        rho0 = (b1 - b2) / (1 - rk)
        old, new = rho0 / rk, b1 - rho0
    return s[i] / s[i - 1], base, base * old, base * new


def _predictor(s, log_snr, i, p):
    """Return columns 4-6 of row i at order p; s and log_snr [T+1] in float64."""
    h = log_snr[i + 1] - log_snr[i]  # infinite at the last step
    base = -(1 - s[i + 1]) * np.expm1(-h)
    old = base * 0.5 * h / (log_snr[i - 1] - log_snr[i]) if p == 2 else 0.0
    return s[i + 1] / s[i], base, old


@dataclasses.dataclass(frozen=True, eq=False)
class DPMSolverPP2M:
    """DPM-Solver++(2M) (Lu et al., arXiv 2211.01095) with data prediction: second order from the
    prediction of the previous step, first order at both ends. It is UniPC's predictor without its
    corrector. Raises ValueError as `UniPC`.
    """

    schedule: Schedule
    table: Float32[np.ndarray, "T 3"] = dataclasses.field(init=False, repr=False)

    def __post_init__(self):
        object.__setattr__(self, "table", unipc_coefficients(self.schedule.sigmas)[:, 4:])

    def init(self, x: Float[Array, " B *latent"]) -> SolverState:
        """Return the state before the first step; x: the initial noise."""
        x = x.astype(jnp.float32)
        return SolverState(x, (jnp.zeros_like(x),))

    def step(
        self, state: SolverState, i: StepIndex, velocity: Float[Array, " B *latent"]
    ) -> SolverState:
        """Return the state after step i, given the velocity at its x."""
        x, (last,) = state.x, state.history
        clean = x - jnp.asarray(self.schedule.sigmas)[i] * velocity.astype(jnp.float32)
        return SolverState(dpm_step(x, clean, last, *jnp.asarray(self.table)[i]), (clean,))


def dpm_step(
    x: Float[Array, " B *latent"],
    clean: Float[Array, " B *latent"],
    last: Float[Array, " B *latent"],
    keep: PerVideo,
    base: PerVideo,
    old: PerVideo,
) -> Float32[Array, " B *latent"]:
    """Return keep x + base m0 + old (m1 - m0).

    clean, last: m0 and m1, the clean samples predicted by this step and the previous one. keep,
    base, old: a row of `DPMSolverPP2M.table`; old = 0 is the first order.
    """
    keep, base, old = (per_sample(value, x) for value in (keep, base, old))
    return keep * x + base * clean + old * (last - clean)


def make_solver(
    name: str, num_steps: int, shift: float, *, order: int = 2, version: str = "diffusers"
):
    """Return a solver by name, with `.schedule`, `.init(x)` and `.step(state, i, velocity)`.

        'unipc'             UniPC on flow_sigmas, the sampler that Wan ships with; the only one with
                            an `order`
        'euler'             Euler on flow_sigmas, Flow-GRPO's deterministic sampler, with the
                            sigmas of training
        'flow_match_euler'  Euler on euler_sigmas, Diffusers' scheduler of that name
        'dpmpp_2m'          DPM-Solver++(2M) on flow_sigmas

    version: of flow_sigmas; euler_sigmas has one. Raises ValueError on an unknown name or version.
    """
    if name == "unipc":
        return UniPC(flow_sigmas(num_steps, shift, version), order)
    if name == "euler":
        return Euler(flow_sigmas(num_steps, shift, version))
    if name == "dpmpp_2m":
        return DPMSolverPP2M(flow_sigmas(num_steps, shift, version))
    if name == "flow_match_euler":
        return Euler(euler_sigmas(num_steps, shift))
    raise ValueError(f"solver={name!r} is unknown; choose one of {', '.join(SOLVERS)}")

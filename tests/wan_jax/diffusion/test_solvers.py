"""UniPC and Euler against the NumPy reference and live Diffusers schedulers, per step and over
whole runs.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import reference
from wan_jax.choices import SOLVERS
from wan_jax.diffusion.schedule import euler_sigmas, flow_sigmas
from wan_jax.diffusion.solvers import (
    DPMSolverPP2M,
    Euler,
    UniPC,
    dpm_step,
    euler_step,
    make_solver,
    unipc_coefficients,
)

SHAPE = (2, 4, 3, 5, 6)  # B C F H W
GRID = [(1, 3.0), (2, 3.0), (3, 5.0), (5, 1.0), (10, 12.0), (20, 3.0), (50, 5.0), (50, 12.0)]


def noise(seed=0, shape=SHAPE):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def fake_model(x, timestep, xp):
    """A smooth, nonlinear stand-in for the transformer: couples positions and depends on the
    timestep.
    """
    return xp.tanh(0.7 * x + timestep / 1000) - 0.5 * xp.cos(2 * x[..., ::-1]) * timestep / 1000


def trajectory(solver, x):
    """All samples [T+1, ...], through one jitted scan with a traced step index."""
    timesteps = jnp.asarray(solver.schedule.timesteps)

    def body(state, i):
        state = solver.step(state, i, fake_model(state.x, timesteps[i], jnp))
        return state, state.x

    _, xs = jax.jit(
        lambda x: jax.lax.scan(body, solver.init(x), jnp.arange(solver.schedule.num_steps))
    )(x)
    return np.concatenate([x[None], np.asarray(xs)])


def relative_error(ours, theirs):
    return np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs))


def assert_close_per_step(ours, theirs, limit=1e-6):
    errors = [relative_error(a, b) for a, b in zip(ours, theirs, strict=True)]
    assert max(errors) <= limit, errors


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("order", [2, 1])  # Wan's is the quick case
def test_unipc_equals_reference(order):
    for (steps, shift), version in zip(GRID, itertools.cycle(("diffusers", "legacy", "legacy"))):
        schedule = flow_sigmas(steps, shift, version)
        sigmas, timesteps = schedule.sigmas.astype(np.float64), schedule.timesteps
        theirs = reference.unipc(
            noise().astype(float), lambda x, i, t=timesteps: fake_model(x, t[i], np), sigmas, order
        )
        assert_close_per_step(trajectory(UniPC(schedule, order), noise()), theirs, 2e-6)


def test_unipc_orders_differ():
    ours = [trajectory(UniPC(flow_sigmas(10, 3.0), order), noise())[-1] for order in (1, 2)]
    assert relative_error(*ours) > 1e-3


def test_last_unipc_step_returns_the_predicted_sample():
    solver = make_solver("unipc", 1, 3.0)
    x, v = jnp.asarray(noise()), jnp.asarray(noise(1))
    out = solver.step(solver.init(x), 0, v).x
    np.testing.assert_allclose(out, x - solver.schedule.sigmas[0] * v, rtol=1e-5, atol=1e-6)
    table = unipc_coefficients(flow_sigmas(20, 3.0).sigmas)
    np.testing.assert_array_equal(table[-1, 4:], [0, 1, 0])  # x' = m0
    assert np.isfinite(table).all()


def test_coefficients_are_computed_in_float64():
    """h is a small difference of logarithms, in float32 wrong by 1e-5 of it."""
    sigmas = flow_sigmas(50, 12.0).sigmas
    found = unipc_coefficients(sigmas)
    np.testing.assert_array_equal(found, unipc_coefficients(sigmas.astype(np.float64)))


def test_dpm_solver_equals_reference():
    for (steps, shift), version in zip(GRID, itertools.cycle(("diffusers", "legacy", "legacy"))):
        solver = DPMSolverPP2M(flow_sigmas(steps, shift, version))
        sigmas, timesteps = solver.schedule.sigmas.astype(np.float64), solver.schedule.timesteps
        theirs = reference.dpm_solver_pp_2m(
            noise().astype(float), lambda x, i, t=timesteps: fake_model(x, t[i], np), sigmas
        )
        assert_close_per_step(trajectory(solver, noise()), theirs, 2e-6)


@pytest.mark.parametrize("name", ["unipc", "euler", "flow_match_euler", "dpmpp_2m"])
def test_exact_on_straight_paths(name):
    """With the true velocity of a straight path, noise - x0, every solver lands on x0."""
    x0, eps = noise(1), noise(2)
    solver = make_solver(name, 7, 5.0)
    sigma = solver.schedule.sigmas[0]
    state = solver.init(jnp.asarray((1 - sigma) * x0 + sigma * eps))
    for i in range(7):
        state = solver.step(state, i, jnp.asarray(eps - x0))
        sigma = solver.schedule.sigmas[i + 1]
        np.testing.assert_allclose(state.x, (1 - sigma) * x0 + sigma * eps, atol=3e-6)


def test_second_order_is_more_accurate_than_euler():
    """Against a 2000-step Euler solution of the same ODE, over flow sigmas with shift 3."""

    def v(x, s):
        return np.tanh(x) + s

    fine = np.linspace(flow_sigmas(20, 3.0).sigmas[0], 0, 2001)
    target = reference.euler(noise().astype(np.float64), lambda x, i: v(x, fine[i]), fine)[-1]
    errors = {}
    for name in ("unipc", "euler", "dpmpp_2m"):
        solver = make_solver(name, 20, 3.0)
        state = solver.init(jnp.asarray(noise()))
        for i in range(20):
            state = solver.step(
                state, i, jnp.asarray(v(np.asarray(state.x), solver.schedule.sigmas[i]))
            )
        errors[name] = relative_error(np.asarray(state.x), target)
    assert max(errors["unipc"], errors["dpmpp_2m"]) < 0.25 * errors["euler"], errors


def test_euler_equals_reference():
    for schedule in (flow_sigmas(20, 3.0), euler_sigmas(20, 3.0)):
        timesteps = schedule.timesteps
        theirs = reference.euler(
            noise().astype(float),
            lambda x, i, t=timesteps: fake_model(x, t[i], np),
            schedule.sigmas.astype(float),
        )
        assert_close_per_step(trajectory(Euler(schedule), noise()), theirs, 2e-6)


def test_euler_step_takes_one_sigma_per_sample():
    x, v = jnp.asarray(noise()), jnp.asarray(noise(1))
    sigma, after = np.array([0.9, 0.5], np.float32), np.array([0.8, 0.1], np.float32)
    both = euler_step(x, v, sigma, after)
    for b in range(2):
        np.testing.assert_allclose(
            both[b], euler_step(x, v, sigma[b], after[b])[b], rtol=1e-5, atol=1e-6
        )
        np.testing.assert_allclose(
            both[b], x[b] + (after[b] - sigma[b]) * v[b], rtol=1e-5, atol=1e-6
        )


def test_dpm_step_takes_one_row_of_the_table_per_sample():
    """As many channels as videos: the values must not be broadcast along the channels."""
    x, clean, last = (jnp.asarray(noise(seed, (2, 1, 3, 2))) for seed in range(3))
    rows = np.array([[0.9, 0.3, 0.0], [0.4, 0.8, -0.2]], np.float32)
    both = dpm_step(x, clean, last, *rows.T)
    for b, (keep, base, old) in enumerate(rows):
        wanted = keep * x[b] + base * clean[b] + old * (last[b] - clean[b])
        np.testing.assert_allclose(both[b], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SOLVERS)
def test_bf16_velocity_keeps_fp32_states_and_arithmetic(name):
    """The steps are those of the same values in fp32, up to its rounding."""
    solver = make_solver(name, 4, 3.0)
    x, *velocities = (jnp.asarray(noise(seed), jnp.bfloat16) for seed in range(4))
    states = [solver.init(x), solver.init(x.astype(jnp.float32))]
    for i, v in enumerate((None, *velocities)):
        if v is not None:
            states = [
                solver.step(state, i - 1, each)
                for state, each in zip(states, (v, v.astype(jnp.float32)))
            ]
        assert {leaf.dtype for leaf in jax.tree.leaves(states)} == {jnp.dtype("float32")}
        np.testing.assert_allclose(states[0].x, states[1].x, rtol=1e-6, atol=1e-6)


def test_make_solver():
    for name, kind, schedule in (
        ("euler", Euler, flow_sigmas(5, 3.0)),
        ("unipc", UniPC, flow_sigmas(5, 3.0)),
        ("dpmpp_2m", DPMSolverPP2M, flow_sigmas(5, 3.0)),
        ("flow_match_euler", Euler, euler_sigmas(5, 3.0)),
    ):
        ours = make_solver(name, 5, 3.0)
        assert type(ours) is kind
        np.testing.assert_array_equal(ours.schedule.sigmas, schedule.sigmas)
        legacy = make_solver(name, 5, 3.0, version="legacy").schedule
        if name != "flow_match_euler":
            schedule = flow_sigmas(5, 3.0, "legacy")
        np.testing.assert_array_equal(legacy.sigmas, schedule.sigmas)
        np.testing.assert_array_equal(legacy.timesteps, schedule.timesteps)
    with pytest.raises(ValueError, match=r"'ddim'.*unipc, euler, flow_match_euler"):
        make_solver("ddim", 5, 3.0)


def test_euler_on_the_legacy_list_is_flow_grpos_evaluation():
    """x + (s_next - s) v on 50 sigmas of Diffusers 0.33, in float64; the largest rounding of a sum of
    51 fp32 terms below 4 is 51 x 4 x 2^-24.
    """
    solver = make_solver("euler", 50, 3.0, version="legacy")
    sigmas, timesteps = reference.flow_sigmas(50, 3.0, "legacy")
    np.testing.assert_array_equal(solver.schedule.timesteps, timesteps)
    x = np.linspace(-1, 1, 8)
    velocities = np.sin(np.arange(50)[:, None] + x)
    wanted = reference.euler(x, lambda _, i: velocities[i], sigmas)[-1]
    state = solver.init(jnp.asarray(x[None], jnp.float32))
    for i, v in enumerate(velocities):
        state = solver.step(state, i, jnp.asarray(v[None], jnp.float32))
    np.testing.assert_allclose(state.x[0], wanted, rtol=0, atol=51 * 4 * 2**-24)


def test_unipc_rejects_what_it_cannot_run():
    with pytest.raises(ValueError, match=r"order=3.*1 or 2"):
        UniPC(flow_sigmas(5, 3.0), order=3)
    with pytest.raises(ValueError, match=r"sigma_0=1.0.*flow_sigmas"):
        UniPC(euler_sigmas(5, 3.0))


def diffusers_trajectory(peer, steps):
    import torch

    peer.set_timesteps(steps)
    peer.set_begin_index(0)
    xs = [torch.from_numpy(noise())]
    for t in peer.timesteps:
        velocity = torch.from_numpy(fake_model(xs[-1].numpy(), np.float32(t), np))
        xs.append(peer.step(velocity, t, xs[-1]).prev_sample)
    return [x.numpy() for x in xs]


@pytest.mark.quick_cases(1)
@pytest.mark.parity
@pytest.mark.parametrize("order", [1, 2])
def test_unipc_is_diffusers(order):
    from diffusers import UniPCMultistepScheduler

    for steps, shift in GRID if order == 2 else GRID[2::3]:
        peer = UniPCMultistepScheduler(
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=shift,
            solver_order=order,
        )
        assert_close_per_step(
            trajectory(make_solver("unipc", steps, shift, order=order), noise()),
            diffusers_trajectory(peer, steps),
        )


@pytest.mark.parity
def test_dpm_solver_is_diffusers():
    from diffusers import DPMSolverMultistepScheduler

    for steps, shift in GRID[::3]:
        peer = DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
        )
        peer.set_timesteps(steps)
        solver = DPMSolverPP2M(flow_sigmas(steps, shift, "legacy"))
        np.testing.assert_allclose(peer.sigmas, solver.schedule.sigmas, atol=1e-6)
        assert_close_per_step(trajectory(solver, noise()), diffusers_trajectory(peer, steps))


@pytest.mark.parity
def test_flow_match_euler_is_diffusers():
    from diffusers import FlowMatchEulerDiscreteScheduler

    for steps, shift in GRID:
        peer = FlowMatchEulerDiscreteScheduler(shift=shift)
        assert_close_per_step(
            trajectory(make_solver("flow_match_euler", steps, shift), noise()),
            diffusers_trajectory(peer, steps),
        )

"""Rows of stochastic steps with random latents, and the policy's loss of them, jitted."""

import jax
import jax.numpy as jnp
import numpy as np

from grpo.learning.policy_loss import Rows, policy_gradient_terms
from wan_jax.diffusion import sde
from wan_jax.diffusion.schedule import flow_sigmas

SHAPE = (8, 4, 1, 3, 5)  # B C F H W
compiled_terms = jax.jit(policy_gradient_terms, static_argnames="config")


def masked_mean(values, mask):
    """Return the mean of values [B] where mask [B] is True; masked values may be NaN."""
    return jnp.sum(jnp.where(mask, values, 0.0)) / jnp.maximum(jnp.sum(mask), 1)


def batch(seed=0, distance=0.06):
    """Eight rows at different steps of one schedule: the float32 arguments of
    `reference.grpo_objective`.
    """
    rng = np.random.default_rng(seed)
    schedule = flow_sigmas(10, 3.0)
    steps = np.arange(1, 9)
    sigma, sigma_next = schedule.sigmas[steps], schedule.sigmas[steps + 1]
    g = sde.diffusion_coefficient(sde.SDEConfig(), schedule)[steps]
    x, v_old, z, a, b = (rng.normal(size=SHAPE).astype(np.float32) for _ in range(5))
    mean, std = sde.sde_mean_std(jnp.asarray(x), jnp.asarray(v_old), sigma, sigma_next, g)
    x_next = np.asarray(mean) + np.asarray(std).reshape(-1, 1, 1, 1, 1) * z
    # Moving the mean by +-distance * std * z changes the log-prob by about +-distance: ratios on
    # both sides of the clip range, and two rows inside it.
    side = np.array([1, -1, 1, -1, 0, 0, 1, -1], np.float32).reshape(-1, 1, 1, 1, 1)
    scale = (np.asarray(std) / (sigma_next - sigma)).reshape(-1, 1, 1, 1, 1)
    v_new = v_old + distance * (0.2 * a + side * scale * z)
    advantages = np.array([1, 1, -1, -1, 2, -0.5, 0.3, -0.7], np.float32)
    return dict(
        x=x,
        x_next=x_next,
        v_new=v_new,
        v_old=v_old,
        v_ref=v_old + distance * b,
        sigma=sigma,
        sigma_next=sigma_next,
        g=g,
        advantages=advantages,
    )


def rows_of(args, old_log_prob, mask=None):
    names = ("x", "x_next", "advantages", "sigma", "sigma_next", "g")
    mask = np.ones(len(args["x"]), bool) if mask is None else mask
    return Rows(
        old_log_prob=jnp.asarray(old_log_prob, jnp.float32),
        mask=jnp.asarray(mask),
        **{name: jnp.asarray(args[name]) for name in names},
    )


def objective(rows, v_new, v_ref, config):
    """Scalar loss, gradient and metrics, jitted as an update would."""

    def loss(v):
        terms, metrics = policy_gradient_terms(rows, v, v_ref, config)
        return masked_mean(terms, rows.mask), metrics

    (value, metrics), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(jnp.asarray(v_new))
    return value, gradient, metrics


def old_log_prob(args):
    return sde.log_prob(
        jnp.asarray(args["x_next"]),
        *sde.sde_mean_std(
            jnp.asarray(args["x"]),
            jnp.asarray(args["v_old"]),
            args["sigma"],
            args["sigma_next"],
            args["g"],
        ),
    )

"""Optimises hidden matrices by Muon and everything else by Adam.

Muon (Jordan et al. 2024) applies momentum, then replaces the update matrix by the nearest
semi-orthogonal one, found by five Newton-Schulz iterations, and scales it by sqrt(max(1, out/in)),
so that one learning rate fits all shapes.
"""

import jax
import jax.numpy as jnp
import optax

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalise(g: jax.Array) -> jax.Array:
    """Return approximately the semi-orthogonal factor of g, fp32 [..., n, m]; computed in bf16."""
    tall = g.shape[-2] > g.shape[-1]
    x = (g.mT if tall else g).astype(jnp.bfloat16)
    x = x / (jnp.linalg.norm(x.astype(jnp.float32), axis=(-2, -1), keepdims=True) + 1e-7).astype(
        x.dtype
    )
    a, b, c = NEWTON_SCHULZ
    for _ in range(5):
        s = x @ x.mT
        x = a * x + (b * s + c * (s @ s)) @ x
    return (x.mT if tall else x).astype(jnp.float32)


def scale_by_muon(momentum: float = 0.95) -> optax.GradientTransformation:
    """Return Muon with Nesterov momentum, without a learning rate."""

    def init(params):
        return jax.tree.map(jnp.zeros_like, params)

    def update(updates, state, params=None):
        del params
        state = jax.tree.map(lambda m, g: momentum * m + g, state, updates)

        def direction(m, g):
            n_in, n_out = g.shape[-2:]
            return orthogonalise(momentum * m + g) * max(1.0, n_out / n_in) ** 0.5

        return jax.tree.map(direction, state, updates), state

    return optax.GradientTransformation(init, update)


def muon_or_adam(params, adam_scale: float) -> optax.GradientTransformation:
    """Return the optimiser of a flat dict of parameters; multiply its updates by -learning_rate.

    adam_scale: factor of Adam's updates.
    """

    def label(path: str, x):
        outer = any(
            word in path
            for word in ("patch_embedding", "proj_out", "embedding", "scale_shift", "head")
        )
        return "muon" if path.endswith("kernel") and x.ndim >= 2 and not outer else "adam"

    labels = {path: label(path, x) for path, x in params.items()}
    adam = optax.chain(optax.scale_by_adam(b1=0.9, b2=0.98), optax.scale(adam_scale))
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.multi_transform({"muon": scale_by_muon(), "adam": adam}, labels),
        optax.add_decayed_weights(0.01),
    )

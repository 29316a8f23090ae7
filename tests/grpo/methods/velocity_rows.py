"""Rows of losses on velocities that need nothing but the velocities."""

from grpo.learning.velocity_loss import Rows, mean_square


def velocity_rows(v, target, weight, *, lagged=None, reference=None) -> Rows:
    """Return rows with these velocities, their errors, and no latents."""
    return Rows(
        x=None,
        x0=None,
        sigma=None,
        v=v,
        v_lagged=lagged or {},
        v_reference=reference,
        error=mean_square(v - target),
        target=target,
        weight=weight,
    )

"""How different the videos of a group are: a sign of collapse, without a reward.

Training moves a policy to the videos that earn most, and in the end it may make the same one from any
noise. Then the advantages of a group are noise too.
"""

import jax
import numpy as np

VALUES = 1024  # of a video's latents, at most, that are compared


@jax.jit
def sampled_values(latents: jax.Array) -> jax.Array:
    """Return at most `VALUES` values of each video, evenly spread over its latents, [n, B].

    latents: fp32 [B, F, H, W, C].
    """
    values = latents.reshape(len(latents), -1)
    stride = -(-values.shape[1] // VALUES)
    return values[:, ::stride].T


def group_spread(values: np.ndarray, group_size: int) -> float:
    """Return the standard deviation of a value over the videos of its group, as a mean over values and
    groups; nan where no group has two videos.

    values: [n, N], of groups of `group_size` videos, one after the other. Videos with a value that is
    not finite do not count.
    """
    groups = values.T.reshape(-1, group_size, len(values)).astype(np.float64)
    finite = [group[np.isfinite(group).all(axis=1)] for group in groups]
    spreads = [group.std(axis=0).mean() for group in finite if len(group) > 1]
    return float(np.mean(spreads)) if spreads else float("nan")

"""A reward in a file of its own, outside of the package: how red a video is (docs/howto/own_rewards.md)."""

import numpy as np


class Redness:
    """Mean of red minus the mean of green and blue, from -1 (cyan) to 1 (pure red)."""

    def score(self, video, request) -> float:
        """Score a video uint8 [T, H, W, 3] RGB. The request, with the prompt, is not used."""
        red, green, blue = video.astype(np.float64).mean(axis=(0, 1, 2)) / 255
        return red - (green + blue) / 2


class ChannelParts:
    """The same as three parts, whose sum is the redness."""

    def score(self, video, request) -> dict[str, float]:
        """Score a video; each part is logged, and can have a weight, e.g. rgb.red."""
        red, green, blue = video.astype(np.float64).mean(axis=(0, 1, 2)) / 255
        return {"red": red, "green": -green / 2, "blue": -blue / 2}


class WinRate:
    """The share of the other videos of the same prompt that a video is redder than; ties count half."""

    def score_group(self, videos, request) -> list[float]:
        """Score the K videos of a prompt together. A video alone, as in evaluations, gets 0.5."""
        if len(videos) == 1:
            return [0.5]
        redness = np.array([Redness().score(video, request) for video in videos])
        differences = redness[:, None] - redness
        wins = (np.sign(differences) + 1) / 2  # [K, K]: 1 for redder than, 0.5 for as red as
        return [float(share) for share in (wins.sum(axis=1) - 0.5) / (len(videos) - 1)]

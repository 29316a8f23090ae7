"""Rewards as users write them."""

import math

import numpy as np

from rewards.base import Score


class Fixed:
    """Returns what it was made with."""

    def __init__(self, result=1.0):
        self.result = result

    def score(self, video, request):
        return self.result


class Parts:
    """Three parts, of which one is nan where the first pixel is 1."""

    def score(self, video, request):
        mean = float(video.mean())
        broken = math.nan if video.flat[0] == 1 else len(request.prompt)
        return {"mean": mean, "length": broken, "fps": request.fps}


class Writes:
    """Changes the video that it gets, and returns its mean."""

    def score(self, video, request):
        video += 1
        return video.mean()


class Asks:
    """Gives the request as its text."""

    def score(self, video, request):
        return Score(1.0, repr((request.prompt, request.targets, request.metadata, request.fps)))


class Rank:
    """The number of videos of the group that are darker, and the group's size as the text."""

    def score_group(self, videos, request):
        means = [video.mean() for video in videos]
        return [Score(float(sum(b < a for b in means)), f"of {len(means)}") for a in means]


class Batches:
    """The mean, with the number of videos of the call as the text."""

    def score_batch(self, videos, requests):
        return [Score(float(video.mean()), f"of {len(videos)}") for video in videos]


class RandomHead:
    """A head whose weights were not loaded."""

    def __init__(self):
        self.weights = np.random.default_rng().normal(size=3)

    def score(self, video, request):
        return video.mean(axis=(0, 1, 2)) @ self.weights


class NanOnBlack:
    """The mean, nan for a black video."""

    def score(self, video, request):
        return video.mean() or math.nan


class OneIsNan:
    """Three parts, of which one is always nan."""

    def score(self, video, request):
        return {"mean": video.mean() / 255, "contrast": video.std() / 255, "broken": math.nan}


class Nothing:
    pass


def fails():
    raise OSError("the model file is missing")


not_callable = 3

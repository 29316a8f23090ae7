"""What a run is told of its own numbers."""

import pytest

from configs.defaults import defaults
from grpo.learner import clip_warning


@pytest.mark.parametrize("error, clip, objective, warned", [
    (6e-4, 1e-5, "clip", True), (6e-4, 1e-3, "clip", False), (3e-6, 2e-6, "guard", True), (1.0, 1e-5, "dppo", False)])
def test_a_clip_range_below_rounding_is_told(error, clip, objective, warned):
    train = defaults().train
    train.clip_low, train.objective = clip, objective
    warning = clip_warning({"ratio_max_error": error}, train)
    assert (warning is not None) == warned
    assert not warned or (f"{error:.1e}" in warning and f"{clip:g}" in warning)


def test_methods_without_a_ratio_are_not_warned():
    assert clip_warning({}, defaults().train) is None

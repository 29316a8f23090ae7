"""Users' own rewards: what they return, what cannot be built, groups and batches."""

import functools
import math
import threading

import numpy as np
import pytest

from rewards.base import PromptRecord, RewardError, Score, Traits
from rewards.own import OwnReward, as_score
from rewards.pool import RewardPool
from tests.rewards import own_rewards
from tests.rewards.drawing import filled

MODULE = "tests.rewards.own_rewards"
RECORD = PromptRecord((), "a sign", {"id": 3}, 24.0)


@pytest.mark.parametrize(
    "result, score",
    [
        (0.5, Score(0.5)),
        (True, Score(1.0)),
        (np.float32(0.5), Score(0.5)),
        (np.array([2]), Score(2.0)),
        ({"a": 1, "b": np.float64(2)}, Score(3.0, parts=(("a", 1.0), ("b", 2.0)))),
        (Score(0.5, "text"), Score(0.5, "text")),
    ],
)
def test_numbers_dicts_and_scores_are_scores(result, score):
    assert OwnReward.of("x", lambda: own_rewards.Fixed(result)).score(filled(0)[0], RECORD) == score


def test_a_part_that_is_not_finite_has_failed():
    score = as_score({"a": 1.0, "b": math.inf}, "x")
    assert math.isnan(score.value) and math.isnan(dict(score.parts)["b"])
    assert dict(score.parts)["a"] == 1.0


@pytest.mark.parametrize(
    "result", [None, "1.0", [1.0], np.zeros(2), {}, {"a.b": 1.0}, {1: 1.0}, {"a": "high"}]
)
def test_another_result_is_an_error_that_names_the_reward(result):
    with pytest.raises(RewardError, match="reward red") as error:
        as_score(result, "red")
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    "target, named",
    [
        ("no_such_module:Red", "no_such_module"),
        (f"{MODULE}:Missing", "Missing"),
        (f"{MODULE}:not_callable", "not_callable"),
        (f"{MODULE}:fails", "model file is missing"),
        (f"{MODULE}:Nothing", "score_group"),
        ("broken_red:Red", "ZeroDivisionError"),
        ("misspelt_red:Red", "SyntaxError"),
        ("needy_red:Red", "no_such_package"),
    ],
)
def test_what_cannot_be_built_is_one_line(tmp_path, target, named):
    (tmp_path / "broken_red.py").write_text("x = 1 / 0\n")
    (tmp_path / "misspelt_red.py").write_text("class Red\n")
    (tmp_path / "needy_red.py").write_text("import no_such_package\n")
    with pytest.raises(RewardError, match=r"^reward red") as error:
        OwnReward("red", target, (str(tmp_path),))
    assert named in str(error.value) and len(str(error.value).splitlines()) == 1


def test_a_module_is_found_in_the_folders_by_a_worker(tmp_path):
    (tmp_path / "own_red.py").write_text("class Red:\n    def score(self, v, r): return 7\n")

    factory = functools.partial(OwnReward, "red", "own_red:Red", (str(tmp_path),))
    with RewardPool(factory, workers=1) as pool:
        assert pool.submit(filled(0), [RECORD]).result().values.tolist() == [7.0]
    with pytest.raises(RewardError) as error:
        RewardPool(functools.partial(OwnReward, "red", "own_red:Blue", (str(tmp_path),)), workers=1)
    assert "'Blue'" in str(error.value) and "Traceback" not in str(error.value)


def test_a_reward_may_write_into_its_copy():
    videos = filled(3)
    assert OwnReward("x", f"{MODULE}:Writes").score(videos[0], RECORD).value == 4
    assert (videos == 3).all()


def test_the_request_holds_what_the_prompts_file_says():
    score = OwnReward("x", f"{MODULE}:Asks").score(filled(0)[0], RECORD)
    assert score.text == repr(("a sign", (), {"id": 3}, 24.0))


def group_pool(workers=0):
    return RewardPool(lambda: OwnReward("x", f"{MODULE}:Rank"), workers, "thread")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_group_is_scored_together_also_from_several_batches(workers):
    with group_pool(workers) as pool:
        assert pool.traits == Traits(groupwise=True, needs_prompt=True)
        first = pool.submit(filled(5, 1, 9), [RECORD] * 3, ["a", "a", "b"], 4)
        second = pool.submit(filled(3, 7, 2), [RECORD] * 3, ["a", "a", "b"], 4)
        scores = first.result(), second.result()  # b is not filled
        alone = pool.submit(filled(5, 1), [RECORD] * 2).result()
    assert [s.values.tolist() for s in scores] == [[2, 0, 1], [1, 3, 0]]
    assert scores[0].texts == ["of 4", "of 4", "of 2"]
    assert alone.values.tolist() == [0, 0] and alone.texts == ["of 1"] * 2


def test_a_group_that_fails_is_tried_again_then_masked(caplog):
    calls = []

    class Counts:
        def score_group(self, videos, request):
            calls.append(len(videos))
            return [1.0]

    with RewardPool(lambda: OwnReward.of("x", Counts)) as pool:
        scores = pool.submit(filled(1, 2), [RECORD] * 2, ["a", "a"], 2).result()
    assert calls == [2, 2]
    assert scores.failures == scores.retries == 2 and not scores.valid.any()
    assert "returned 1 scores for 2 videos" in scores.errors[0] and len(caplog.records) == 1


def test_a_group_that_fails_once_has_the_scores_of_the_second_attempt():
    attempts = iter([[math.nan, 1.0], [2.0, 3.0]])

    class Once:
        def score_group(self, videos, request):
            return next(attempts)

    with RewardPool(lambda: OwnReward.of("x", Once)) as pool:
        scores = pool.submit(filled(1, 2), [RECORD] * 2, ["a", "a"], 2).result()
    assert scores.values.tolist() == [2, 3] and scores.valid.all() and scores.retries == 2


def test_waiting_videos_are_scored_in_batches_of_one_shape():
    started, go = threading.Event(), threading.Event()

    class Waits(own_rewards.Batches):
        def score_batch(self, videos, requests):
            started.set()
            go.wait(10)
            return super().score_batch(videos, requests)

    with RewardPool(lambda: OwnReward.of("x", Waits), 1, "thread", batch=3) as pool:
        pending = [pool.submit(filled(1), [RECORD])]
        started.wait(10)
        pending.append(pool.submit(filled(2, 3, 4, 5), [RECORD] * 4))
        pending.append(pool.submit(filled(6)[:, :1, :2, :2], [RECORD]))
        go.set()
        texts = [text for p in pending for text in p.result().texts]
    assert texts == ["of 1", "of 3", "of 3", "of 3", "of 1", "of 1"]

"""Videos scored over HTTP: the values of this process, bit for bit, also when servers fail."""

import contextlib
import functools
import math
import time

import numpy as np
import pytest

from tests.rewards import own_rewards, pool_rewards
from tests.rewards.serving import TOKEN, Command, scripted, serving

pytest.importorskip("fastapi")

from rewards.base import PromptRecord, RewardError, Score
from rewards.ocr.rules import even_frames
from rewards.own import OwnReward
from rewards.pool import RewardPool
from rewards.remote.client import RemoteReward

VIDEOS = np.random.default_rng(0).integers(0, 256, (12, 9, 4, 5, 3), np.uint8)
QUICK = {"token": TOKEN, "timeout": 5.0, "patience": 20.0, "first_pause": 0.05, "seed": 0}


def pool_of(urls, workers=4, **options):
    reward = RemoteReward(urls, **QUICK | options)
    return RewardPool(lambda: reward, workers, "thread")


def local(videos=VIDEOS, reward=pool_rewards.Brightness):
    with RewardPool(reward) as pool:
        return pool.submit(videos, [("a",)] * len(videos)).result()


class Judged:
    """Judges some frames, like the OCR reward, each with a text and a value."""

    def score(self, frames, record):
        indices = even_frames(len(frames), 4)
        values = tuple(float(frames[i].mean() / 3) for i in indices)
        return Score(
            float(np.mean(values)),
            f"早 {record!r}",
            indices,
            values,
            tuple(f"{v!r}" for v in values),
        )


@pytest.mark.parametrize("servers", [1, 2])
def test_scores_are_those_of_this_process(servers):
    with (
        serving(Judged) as first,
        serving(Judged) as second,
        pool_of([first, second][:servers]) as pool,
    ):
        scores = pool.submit(VIDEOS, [("a", "b\n")] * 12).result()
    with RewardPool(Judged) as local_pool:
        expected = local_pool.submit(VIDEOS, [("a", "b\n")] * 12).result()
    assert scores.scores == expected.scores and scores.values.tobytes() == expected.values.tobytes()
    assert scores.texts == expected.texts and scores.failures == scores.retries == 0


def test_frames_that_are_not_read_stay_here():
    seen = []

    class Seen(Judged):
        def score(self, frames, record):
            seen.append(len(frames))
            return super().score(frames, record)

    with serving(Seen) as url:
        reward = RemoteReward([url], select=functools.partial(even_frames, max_frames=4), **QUICK)
        score, expected = reward.score(VIDEOS[0], "a"), Judged().score(VIDEOS[0], "a")
    assert seen == [4] and score == expected and score.frames == (0, 3, 5, 8)


def test_several_videos_in_one_request(tmp_path):
    videos = np.stack([np.full((2, 2, 2, 3), value, np.uint8) for value in (0, 1, 2)])
    with serving(lambda: pool_rewards.Mean(str(tmp_path))) as url:
        first, second, third = RemoteReward([url], **QUICK).score_batch(videos, ["a", "b", "c"])
    assert (first.value, third.value) == (0, 2)
    assert isinstance(second, RewardError) and "this video cannot be judged" in str(second)


def test_submitting_returns_at_once():
    with serving(pool_rewards.Slow, workers=4) as url, pool_of([url]) as pool:
        start = time.monotonic()
        pending = pool.submit(VIDEOS[:4], ["a"] * 4)
        assert time.monotonic() - start < 0.2 and not pending.done()
        assert pending.result().valid.all()


def test_a_video_that_cannot_be_judged_is_masked(tmp_path):
    videos = np.stack([np.full((2, 2, 2, 3), value, np.uint8) for value in (0, 1, 2)])
    with serving(lambda: pool_rewards.Mean(str(tmp_path))) as url, pool_of([url]) as pool:
        scores = pool.submit(videos, ["a", "b", "c"]).result()
    assert scores.valid.tolist() == [True, False, True] and scores.failures == 1
    assert "this video cannot be judged" in scores.errors[1]


@pytest.mark.slow
def test_a_killed_server_leaves_its_work_to_the_other_and_a_restart_costs_a_wait_only():
    slow = ("--reward=tests.rewards.pool_rewards:Slow", "--workers=2")
    with Command(*slow) as one, Command(*slow) as other:
        url = other.url()
        with pool_of([one.url(), url]) as pool:
            pending = pool.submit(VIDEOS, ["a"] * 12)
            time.sleep(0.3)
            one.kill()
            scores = pending.result(timeout=30)
            assert scores.valid.all() and (scores.failures, scores.retries) == (0, 0)
            pending = pool.submit(VIDEOS[:4], ["a"] * 4)
            time.sleep(0.3)
            other.kill()
            with Command(*slow, port=url.rsplit(":", 1)[1]):
                assert pending.result(timeout=30).valid.all()


@pytest.mark.slow
def test_when_all_servers_are_gone_videos_are_masked_until_one_is_back():
    with contextlib.ExitStack() as stack:
        with serving() as url:
            pool = stack.enter_context(pool_of([url], patience=0.3))
            assert pool.submit(VIDEOS, ["a"] * 12).result().valid.all()
        start = time.monotonic()
        scores = pool.submit(VIDEOS, ["a"] * 12).result(timeout=30)
        assert not scores.valid.any() and scores.failures == 12 and np.isnan(scores.values).all()
        assert "no reward server works" in scores.errors[0] and time.monotonic() - start < 3
        with serving(port=int(url.rsplit(":", 1)[1])):
            deadline = time.monotonic() + 10
            while not (again := pool.submit(VIDEOS, ["a"] * 12).result()).valid.all():
                assert time.monotonic() < deadline
            assert again.values.tolist() == local().values.tolist()


@pytest.mark.slow
def test_a_server_with_other_settings_is_refused_also_after_a_restart():
    about = {"name": "ocr", "rule": "spelling"}
    with serving(about=about) as one, serving(about=about | {"rule": "flow_grpo_video"}) as other:
        with pytest.raises(
            RewardError, match="scores with rule='flow_grpo_video' instead of 'spelling'"
        ):
            RemoteReward([one, other], **QUICK)
        with pytest.raises(
            RewardError, match="scores with max_frames=None instead of 9: start it with the same"
        ):
            RemoteReward([one], expect=about | {"max_frames": 9}, **QUICK)
        RemoteReward([other], **QUICK)
    with (
        scripted(lambda *_: (200, {"status": "fine"})) as url,
        pytest.raises(RewardError, match="is not a reward server"),
    ):
        RemoteReward([url], **QUICK)


def test_a_wrong_token_stops_the_start():
    with serving() as url, pytest.raises(RewardError, match="refused the token") as error:
        RemoteReward([url], **QUICK | {"token": "wrong-token"})
    assert "wrong-token" not in str(error.value)


def test_closing_the_pool_does_not_wait_for_a_server():
    with serving(pool_rewards.Slow, workers=1) as url:
        pool = pool_of([url])
        pending = pool.submit(VIDEOS, ["a"] * 12)
        time.sleep(0.1)
        start = time.monotonic()
        pool.close()
        assert time.monotonic() - start < 0.3
        with pytest.raises(RewardError, match="closed before this batch"):
            pending.result()


# --- Rewards of users, by version 2 ---------------------------------------------------------------

RECORD = PromptRecord((), "sign", {"id": 7}, 24.0)


def test_a_server_gets_the_request_and_answers_with_parts():
    parts = functools.partial(OwnReward.of, "va", own_rewards.Parts)
    with serving(parts, about={"name": "va"}) as url:
        reward = RemoteReward([url], expect={"name": "va"}, **QUICK)
        scores = [reward.score(np.full((2, 2, 2, 3), n, np.uint8), RECORD) for n in (3, 1)]
        with pytest.raises(RewardError, match="name='va' instead of 'other'"):
            RemoteReward([url], expect={"name": "other"}, **QUICK)
    assert scores[0].value == 3 + 4 + 24 and dict(scores[0].parts)["fps"] == 24
    assert math.isnan(scores[1].value) and dict(scores[1].parts)["mean"] == 1
    assert math.isnan(dict(scores[1].parts)["length"])
    with serving(functools.partial(OwnReward.of, "x", own_rewards.Asks)) as url:
        text = RemoteReward([url], **QUICK).score(VIDEOS[0], RECORD).text
    assert text == repr(("sign", (), {"id": 7}, 24.0))


def test_a_group_is_scored_together_by_a_server():
    with serving(functools.partial(OwnReward.of, "x", own_rewards.Rank)) as url:
        with pool_of([url]) as pool:
            assert pool.traits.groupwise
            scores = pool.submit(VIDEOS, [RECORD] * 12, [n % 3 for n in range(12)], 4).result()
    means = VIDEOS.mean(axis=(1, 2, 3, 4))
    assert scores.texts == ["of 4"] * 12
    assert scores.values.tolist() == [
        sum(means[j] < means[i] for j in range(i % 3, 12, 3)) for i in range(12)
    ]


def test_a_server_of_version_1_gets_version_1():
    bodies = []

    def old(method, path, headers, body):
        if method == "GET":
            return 200, {"reward": {"name": "va"}, "workers": 1}
        bodies.append(bytes(body))
        return 200, {"scores": [{"valid": True, "value": 0.5}]}

    with scripted(old) as url:
        assert RemoteReward([url], **QUICK).score(VIDEOS[0], RECORD).value == 0.5
    assert bodies[0].startswith(b"WANRWD1\n") and b'"prompt": "sign"' in bodies[0]


def test_a_reward_that_reads_targets_gets_them_from_version_2():
    with serving(pool_rewards.Targets) as url:
        record = PromptRecord(("OPEN", "NOW"), "a sign")
        assert RemoteReward([url], **QUICK).score(VIDEOS[0], record).text == "OPEN NOW"

import ml_collections
import numpy as np
import pytest

from configs import tiny_ocr
from configs.defaults import defaults
from grpo.scoring.reward_combination import MAIN
from grpo.scoring.reward_pool import open_pool
from grpo.scoring.reward_servers import check_settings, connect, warn_of_readers
from grpo.settings import parse
from rewards.base import RewardError
from rewards.judge import TRANSCRIBE
from tests.rewards.drawing import video
from tests.rewards.serving import TOKEN, Command, scripted
from wan_jax.command_line.cli import UserError


def reward_of(**changes) -> ml_collections.ConfigDict:
    c = defaults().reward
    c.update({"timeout": 10.0, "patience": 5.0} | changes)
    return c


def test_servers_score_as_this_process_does(monkeypatch):
    """The whole way, with the command and the real engine."""
    pytest.importorskip("fastapi")
    monkeypatch.setenv("A_TOKEN", f"{TOKEN}\n")
    videos, targets = video("OPEN", frames=12)[None], [("OPFN",)]
    # stability comes from the server's score, flicker from this process
    weights = {MAIN: 1.0, "stability": 0.1, "flicker": 0.0}
    with Command("--workers=1", "--max_frames=3") as server:
        url = server.url()
        with open_pool(
            reward_of(servers=(url,), max_frames=3, token_env="A_TOKEN"), weights
        ) as pool:
            remote = pool.submit(videos, targets).result()
        with pytest.raises(
            UserError, match="scores with max_frames=3 instead of 9: start it with the same"
        ):
            open_pool(reward_of(servers=(url,), token_env="A_TOKEN"), {MAIN: 1.0})
        with pytest.raises(UserError, match=r"refused the token.*token_env names"):
            open_pool(reward_of(servers=(url,), token_env="NOT_SET"), {MAIN: 1.0})
    with open_pool(reward_of(max_frames=3, workers=0), weights) as pool:
        local = pool.submit(videos, targets).result()
    assert (
        local.valid.all() and remote.scores == local.scores and local.scores[0].frames == (0, 6, 11)
    )
    assert [name for name, _ in local.scores[0].parts] == list(weights)
    with pytest.raises(UserError, match=r"no reward server works.*refused"):
        open_pool(reward_of(servers=(url,)), {MAIN: 1.0})


def test_malformed_scores_are_masked():
    c = reward_of(retries=0)
    about = {name: c[name] for name in ("rule", "engine", "max_frames")} | {"name": "ocr"}
    good = {"valid": True, "value": 1.0}
    changes = [
        {},
        {"value": 1.01},
        {"value": -7},
        {"value": 1e308},
        {"value": True},
        {"value": float("nan")},
        {"value": None},
        {"parts": [["a", 1, 2]]},
        {"parts": 5},
        {"parts": [["x", "abc"]]},
        {"frames": [99]},
    ]

    def server(method, path, headers, body):
        if method == "GET":
            return 200, {"reward": about}
        number = int.from_bytes(body[-3:-2])
        return 200, {"scores": [good | changes[number]]}

    videos = np.stack([np.full((2, 4, 4, 3), number, np.uint8) for number in range(len(changes))])
    with scripted(server) as url:
        c.servers = (url,)
        with open_pool(c, {MAIN: 1.0}) as pool:
            scores = pool.submit(videos, [("OPEN",)] * len(videos)).result()
    assert (
        scores.valid.tolist() == [True] + [False] * 10
        and scores.failures == 10
        and scores.values[0] == 1.0
    )
    assert all("malformed" in error for error in scores.errors[1:])


@pytest.mark.parametrize(
    "question, answer, value",
    [
        ("transcribe", "OPFN", 0.75),
        ("yes_no", "No", 0),
        ("rate", "7", 0.7),
        ("letters", "missing=1 extra=0 wrong=0", 0.75),
    ],
)
def test_a_judge(question, answer, value):
    asked = []

    def model(method, path, headers, body):
        if path == "/v1/models":
            return 200, {"data": [{"id": "a-model"}]}
        asked.append(TRANSCRIBE.encode() in body)
        return 200, {"choices": [{"message": {"content": answer}}]}

    with scripted(model) as url:
        c = reward_of(servers=(url,), engine="judge", judge_question=question, max_frames=2)
        with open_pool(c, {MAIN: 1.0}) as pool:
            assert pool.submit(video("OPEN")[None], [("OPEN",)]).result().values.tolist() == [value]
    assert asked == ([True, True] if question == "transcribe" else [False])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"reader_two": "rapidocr"}, "reader_two='rapidocr' is also config.reward.engine"),
        (
            {"reader_two": "paddleocr", "engine": "judge", "servers": ("http://a",)},
            "reader_two='paddleocr'.*engine='judge'",
        ),
        ({"engine": "judge"}, r"config.reward.servers=\(\) names none"),
        ({"servers": ("cpu1:8080",)}, "config.reward.servers: .*write http://host:port"),
        ({"servers": ("http://a", "http://user:hush@b")}, "environment variable instead"),
        (
            {"servers": ("http://a",), "workers": 0},
            "config.reward.workers=0.*number of videos in flight",
        ),
        (
            {
                "servers": ("http://a",),
                "engine": "judge",
                "judge_question": "rate",
                "weights": {"stability": 0.0},
            },
            r"weights.stability=0.0 .*use 'transcribe'",
        ),
        ({"servers": ("http://a",), "timeout": 0.0}, "config.reward.timeout=0.0 must be above 0"),
        ({"servers": ("http://a",), "token_env": "hush-hush"}, "never the token itself"),
    ],
)
def test_settings_that_cannot_be_meant(changes, message):
    with pytest.raises(UserError, match=message) as error:
        check_settings(reward_of(**changes))
    assert "hush" not in str(error.value)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"train.box_credit": 0.5}, "train.box_credit=0.5"),
        ({"reward.weights.text_area": 0.0}, "reward.weights.text_area=0.0"),
        ({"reward.panel": ("text_area",)}, "reward.panel=('text_area',)"),
    ],
)
@pytest.mark.parametrize(
    "without, lacking",
    [
        ({"reward.servers": ("http://a:1",)}, "reward.servers=('http://a:1',)"),
        ({"reward.weights.ocr": None, "reward.weights.motion": 1.0}, "reward.weights.ocr=None"),
    ],
)
def test_boxes_need_a_reader_on_this_machine(changes, named, without, lacking):
    config = tiny_ocr.get_config()
    config.update_from_flattened_dict(changes | without)
    with pytest.raises(UserError) as error:
        parse.from_config(config)
    assert named in str(error.value) and lacking in str(error.value)


@pytest.mark.parametrize(
    "changes, warned",
    [
        ({}, ""),
        ({"second_engine": "paddleocr"}, ""),
        ({"second_engine": "rapidocr"}, "second_engine=rapidocr"),
        ({"reader_two": "rapidocr_v4", "second_engine": "paddleocr"}, ""),
        (
            {"reader_two": "rapidocr_v4", "second_engine": "rapidocr_v4"},
            "second_engine=rapidocr_v4",
        ),
        ({"reader_two": "rapidocr_v4"}, "rapidocr and rapidocr_v4"),
    ],
)
def test_a_judge_that_training_pleases_is_warned_of(caplog, changes, warned):
    warn_of_readers(reward_of(**changes))
    assert len(caplog.records) == bool(warned) and warned in caplog.text


@pytest.mark.parametrize("readers, wanted", [({"reader_two": "paddleocr"}, ""), ({}, "paddleocr")])
def test_a_server_must_have_the_same_readers(readers, wanted):
    about = {"name": "ocr", "rule": "spelling", "engine": "rapidocr", "max_frames": 9}
    health = 200, {"reward": about | readers, "wire": [1, 2], "workers": 1}
    with scripted(lambda *_: health) as url, pytest.raises(RewardError, match="reader_two="):
        connect(reward_of(servers=(url,), reader_two=wanted))


def test_settings_without_servers_are_as_before():
    check_settings(defaults().reward)
    check_settings(reward_of(servers=("http://a:1", "https://b/path")))

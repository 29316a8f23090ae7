"""A vision model as the judge, behind a small endpoint that answers as vLLM and SGLang do."""

import base64
import contextlib
import io
import json

import numpy as np
import pytest
from PIL import Image

from rewards.base import RewardError
from rewards.judge import (
    QUESTIONS,
    TRANSCRIBE,
    JudgeReward,
    Transcriber,
    VisionEndpoint,
    parse_letters,
    parse_rating,
    parse_transcript,
    parse_yes_no,
)
from rewards.ocr.rules import OCRReward
from rewards.pool import RewardPool
from tests.rewards.serving import scripted

FRAMES = np.random.default_rng(0).integers(0, 256, (5, 8, 16, 3), np.uint8)
QUICK = {"timeout": 5.0, "patience": 2.0, "first_pause": 0.02, "seed": 0}


@contextlib.contextmanager
def judging(reply, models=("a-model",), path="", **options):
    """Run a model that answers `reply(frames, question)`, a text or (status, object for JSON); gives
    (endpoint, list of its requests).
    """
    requests = []

    def answer(method, path, headers, body):
        if path == "/v1/models":
            return 200, {"object": "list", "data": [{"id": name} for name in models]}
        assert (method, path) == ("POST", "/v1/chat/completions")
        request = json.loads(body)
        requests.append(request | {"authorization": headers["Authorization"]})
        content = request["messages"][0]["content"]
        frames = [
            _pixels(part["image_url"]["url"]) for part in content if part["type"] == "image_url"
        ]
        result = reply(frames, content[-1]["text"])
        if isinstance(result, tuple):
            return result
        return 200, {
            "choices": [
                {"message": {"role": "assistant", "content": result}, "finish_reason": "stop"}
            ]
        }

    with scripted(answer) as url:
        endpoint = VisionEndpoint([url + path], **QUICK | options)
        yield endpoint, requests
        endpoint.close()


def _pixels(url):
    kind, data = url.split(",")
    assert kind == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def test_what_is_sent():
    shown = []

    def reply(frames, question):
        shown.append((frames, question))
        return "OPEN"

    names = {"models": ("other", "a-model"), "model": "a-model"}
    with judging(reply, path="/v1/", token="a-token", **names) as (judge, requests):
        assert judge.ask("What?", FRAMES[:2]) == "OPEN"
    ((frames, question),) = shown
    assert question == "What?" and np.array_equal(np.stack(frames), FRAMES[:2])
    assert requests[0]["model"] == "a-model" and requests[0]["temperature"] == 0
    assert requests[0]["authorization"] == "Bearer a-token"


def test_transcripts_are_scored_by_the_rules_of_ocr():
    texts = {
        0: "OPEN",
        1: "```\nOPEN\n24 HOURS\n```",
        2: "NO TEXT",
        3: '"OPFN"',
        4: "<think>a sign?</think>\n\nOPEN",
    }

    def reply(frames, question):
        assert question == TRANSCRIBE and len(frames) == 1
        return texts[next(i for i in range(5) if np.array_equal(frames[0], FRAMES[i]))]

    with judging(reply) as (judge, requests):
        score = OCRReward(engine=Transcriber(judge)).score(FRAMES, ("OPEN",))
    assert score.frame_texts == ("OPEN", "OPEN 24 HOURS", "", "OPFN", "OPEN")
    assert score.frame_values == (1, 1 - 7 / 22, 0, 0.75, 1) and score.value == np.mean(
        score.frame_values
    )
    assert len(requests) == 5


def test_boxes_are_rows_from_top_to_bottom():
    with judging(lambda *_: "OPEN\n24 HOURS") as (judge, _):
        first, second = Transcriber(judge)(FRAMES[0])
    assert (
        first.box == ((0, 0), (16, 0), (16, 4), (0, 4))
        and second.box[0] == (0, 4)
        and second.confidence == 1
    )


@pytest.mark.parametrize(
    "answer, lines",
    [
        ("OPEN", ["OPEN"]),
        ("  OPEN \n\n 24 h\n", ["OPEN", "24 h"]),
        ("NO TEXT", []),
        ("No visible text.", []),
        ("", []),
        ("```text\nA\nB\n```", ["A", "B"]),
        ("The text is:\n```\nA\n```", ["A"]),
        ("“OPEN”", ["OPEN"]),
        ("`OPEN`", ["OPEN"]),
        ('"A" and "B"', ['"A" and "B"']),
        ("NO TEXTING", ["NO TEXTING"]),
        ('"', ['"']),
    ],
)
def test_transcripts(answer, lines):
    assert parse_transcript(answer) == lines


@pytest.mark.parametrize(
    "answer, value",
    [
        ("Yes", 1),
        ("no.", 0),
        ("**Yes**, it does", 1),
        ("No, not: yes", 0),
        ("maybe", None),
        ("nothing", None),
        ("", None),
    ],
)
def test_yes_or_no(answer, value):
    check(parse_yes_no, answer, value)


@pytest.mark.parametrize(
    "answer, value",
    [
        ("8", 0.8),
        ("10", 1),
        ("Rating: 7.5", 0.75),
        ("8/10", 0.8),
        ("0", 0),
        ("6 out of 10", 0.6),
        ("From 0 to 10 I say 4.", 0.4),
        ("11", None),
        ("-3", None),
        ("80%", None),
        ("good", None),
    ],
)
def test_ratings(answer, value):
    check(parse_rating, answer, value)


@pytest.mark.parametrize(
    "answer, value",
    [
        ("missing=0 extra=0 wrong=0", 1),
        ("The O is cut.\nMissing: 1, extra: 0 and wrong: 1", 0.75),  # of 8 letters
        ("missing=1 extra=1 wrong=1\n**missing=0 extra=1 wrong=0**", 0.875),
        ("missing=9 extra=0 wrong=3", 0),
        ("missing=0 extra=-1 wrong=0", None),
        ("no letter is missing", None),
        ("", None),
    ],
)
def test_letters(answer, value):
    check(lambda text: parse_letters(text, ("OPEN now", "!")), answer, value)


def check(parse, answer, value):
    if value is None:
        with pytest.raises(RewardError, match="the judge"):
            parse(answer)
    else:
        assert parse(answer) == value


@pytest.mark.parametrize(
    "question, answer, value",
    [("yes_no", "Yes", 1.0), ("rate", "7", 0.7), ("letters", "missing=1 extra=0 wrong=1", 5 / 7)],
)
def test_a_question_about_the_video(question, answer, value):
    with judging(
        lambda frames, asked: (
            f"{answer}" if len(frames) == 3 and '"OPEN" and "24 h"' in asked else "?"
        )
    ) as (judge, requests):
        score = JudgeReward(judge, question, max_frames=3).score(FRAMES, ("OPEN", "24 h"))
    assert (score.value, score.text, score.frames) == (value, answer, (0, 2, 4)) and len(
        requests
    ) == 1


def test_a_template_of_ones_own():
    with judging(lambda frames, question: {'Is it {clear}: "A"?': "yes"}[question]) as (judge, _):
        assert (
            JudgeReward(judge, "yes_no", "Is it {clear}: {targets}?").score(FRAMES, ("A",)).value
            == 1
        )


def test_in_a_pool_failures_are_masked():
    videos = np.stack([FRAMES, 255 - FRAMES, FRAMES])

    def reply(frames, question):
        return "5" if np.array_equal(frames[0], FRAMES[0]) else "I cannot say"

    with judging(reply) as (judge, _):
        reward = JudgeReward(judge)
        with RewardPool(lambda: reward, 2, "thread") as pool:
            scores = pool.submit(videos, [("A",)] * 3).result()
    assert scores.valid.tolist() == [True, False, True] and scores.values[[0, 2]].tolist() == [
        0.5,
        0.5,
    ]
    assert "no number from 0 to 10: 'I cannot say'" in scores.errors[1]


@pytest.mark.parametrize(
    "reply, message",
    [
        (
            (400, {"object": "error", "message": "too many images"}),
            "refused the request: 400 too many images",
        ),
        (
            (400, {"error": {"message": "too long", "code": 400}}),
            "refused the request: 400 too long",
        ),
        ((200, {"choices": []}), "no complete answer"),
        ((200, [1]), "no complete answer"),
        ((200, {"choices": [{"message": {"content": None}}]}), "no complete answer"),
        ((200, {"choices": [{"message": {"content": "A" * 100_000}}]}), "no complete answer"),
        (
            (200, {"choices": [{"message": {"content": "A"}, "finish_reason": "length"}]}),
            "no complete answer of at most 1024",
        ),
    ],
)
def test_answers_that_are_none(reply, message):
    with judging(lambda *_: reply) as (judge, _), pytest.raises(RewardError, match=message):
        judge.ask("What?", FRAMES[:1])


def test_a_failure_is_tried_again():
    replies = iter([(500, {"message": "out of memory"}), "7"])
    with judging(lambda *_: next(replies)) as (judge, _):
        assert JudgeReward(judge).score(FRAMES, ("A",)).value == 0.7


def test_the_start():
    with pytest.raises(RewardError, match="serves one, two, not '': give the name of one"):
        with judging(None, models=("one", "two")):
            pass
    with pytest.raises(RewardError, match="serves one, not 'two'"):
        with judging(None, models=("one",), model="two"):
            pass
    with pytest.raises(RewardError, match=r"serves 5, None,  \[31m, not 'two'"):
        with judging(None, models=(5, None, "\x1b[31m"), model="two"):
            pass
    with (
        scripted(lambda *_: (200, {"reward": {}})) as url,
        pytest.raises(RewardError, match="OpenAI-compatible"),
    ):
        VisionEndpoint([url], **QUICK)
    with judging(None) as (judge, _):
        assert judge.model == "a-model"
        with pytest.raises(ValueError, match="choose one of yes_no, rate, letters"):
            JudgeReward(judge, "style")
        with pytest.raises(ValueError, match="max_frames=1"):
            JudgeReward(judge, max_frames=1)
    assert all("{targets}" in wording for wording, _ in QUESTIONS.values())

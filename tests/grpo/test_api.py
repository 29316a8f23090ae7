"""Training, scoring and evaluating from Python."""

import os
import signal
import threading

import numpy as np
import pytest

import wan_jax
from grpo import api
from tests.grpo import here
from tests.grpo.tiny_run import assert_same, newest, result
from wan_jax.errors import UserError

SETTINGS = {"epochs": 2, "reward": {"weights": {"ocr": None}, "panel": (), "workers": 1}}
MODULE = (
    "class brightness:\n    def score(self, video, request):\n        return video.mean() / 255\n"
)


def brightness(video, request):
    assert video.dtype == np.uint8 and video.ndim == 4 and request.prompt
    return video.mean() / 255


def videos_of(*prompts: str) -> wan_jax.Videos:
    levels = np.arange(len(prompts), dtype=np.uint8)[:, None, None, None, None]
    return wan_jax.Videos(np.broadcast_to(levels, (len(prompts), 1, 16, 16, 3)).copy(), prompts)


@pytest.mark.slow
def test_a_function_trains_like_a_module_also_after_a_signal(recipe, monkeypatch, tmp_path):
    """SIGTERM in the first epoch: it is finished, the program is told, and the same call goes on."""
    here.share(monkeypatch)
    config, run = recipe
    (tmp_path / "in_a_file.py").write_text(MODULE)
    by_file = api.recipe(config, run_dir=f"{run}_file", **SETTINGS)
    by_file.reward.own = {"brightness": "in_a_file:brightness"}
    by_file.reward.own_weights = {"brightness": 1.0}
    expected = api.train(by_file)

    received, calls = [], []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))

    def interrupting(video, request):
        calls.append(threading.current_thread())
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return brightness(video, request)

    interrupting.__qualname__ = "brightness"
    by_function = api.recipe(config, **SETTINGS)
    try:
        done = api.train(by_function, interrupting)
        assert received == [signal.SIGTERM] and newest(run) == 1
        done = api.train(by_function, interrupting)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == [signal.SIGTERM] and newest(run) == 2
    assert_same(result(run), result(expected.folder))
    assert [record["main"] for record in done.evaluations] == ["brightness"] * 2
    assert done.evaluations[-1]["reward"] == expected.evaluations[-1]["reward"]
    assert [record["epoch"] for record in done.epochs] == [1, 2]

    records = api.evaluate(by_function, done, out=tmp_path / "eval", reward=brightness, base=False)
    assert [record["epoch"] for record in records] == [2]
    assert records[0]["rewards"] == pytest.approx(done.evaluations[-1]["rewards"], abs=1 / 255)
    api.export(done, tmp_path / "lora.safetensors", "lora")
    assert (tmp_path / "lora.safetensors").stat().st_size > 1000
    trained = done.model.sample("A cat.", height=16, width=32, steps=2)
    base = wan_jax.load(by_function.model.path).sample("A cat.", height=16, width=32, steps=2)
    assert (trained.frames != base.frames).any()


def test_scores_of_a_function_an_object_and_a_class():
    class Wins:
        def score_group(self, videos, request):
            return [sum(a.mean() > b.mean() for b in videos) for a in videos]

    videos = videos_of("a cat", "a cat", "a dog", "a dog")
    assert api.score(videos, brightness).values.tolist() == [0, 1 / 255, 2 / 255, 3 / 255]
    assert api.score(videos, Wins).values.tolist() == [0, 1, 0, 1]
    mixed = videos_of("a cat", "a dog", "a cat", "a dog")
    assert api.score(mixed, Wins()).values.tolist() == [0] * 4

    def fails(video, request):
        return {"good": 1.0, "bad": 1.0} if video.mean() else 1 / 0

    broken = wan_jax.Videos(videos.frames, videos.prompts, np.array([True, True, False, True]))
    scores = api.score(broken, fails)
    assert scores.valid.tolist() == [False, True, False, True] and "ZeroDivision" in scores.why()
    assert scores.parts["fails.bad"][[1, 3]].tolist() == [1, 1]
    with pytest.raises(UserError, match="none of the methods"):
        api.score(videos, object())


def test_scores_by_the_rewards_of_a_recipe(recipe):
    config = api.recipe(recipe[0], reward={"weights": {"ocr": None, "exposure": 1.0}, "panel": ()})
    scores = api.score(videos_of("a cat", "a dog"), config=config)
    assert scores.main == "exposure" and scores.values[0] < scores.values[1]
    both = api.score(videos_of("a cat", "a dog"), brightness, config)
    assert both.main == "brightness" and both.parts["exposure"].tolist() == scores.values.tolist()
    with pytest.raises(UserError, match="'a cat'"):
        api.score(videos_of("a cat"))


def test_a_reward_is_named_and_weighted_beside_those_of_the_recipe(recipe):
    config = api.recipe(recipe[0])
    changed, objects = api._with_reward(config, brightness)
    assert objects == {"brightness": brightness} and "brightness" not in config.reward.weights
    assert (changed.reward.weights.ocr, changed.reward.weights.brightness) == (0.0, 1.0)
    assert changed.reward.own == {"brightness": f"{__name__}:brightness"}
    config.reward.weights.brightness = 0.5  # its own weights stay
    changed, _ = api._with_reward(config, brightness)
    assert (changed.reward.weights.ocr, changed.reward.weights.brightness) == (1.0, 0.5)

    def ocr(video, request):
        return 0.0

    for reward, name in ((lambda video, request: 0.0, "lambda"), (ocr, "own_ocr")):
        changed, objects = api._with_reward(api.recipe(recipe[0]), reward)
        assert [*objects] == [name]
        api.parse.recipe_from_config(changed)  # accepts the name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epoch": 1}, "epoch.*epochs"),
        ({"train": {"learning": 1}}, r"train\.learning.*train\.learning_rate"),
        ({"train": {"learning_rate": "fast"}}, r"config\.train\.learning_rate='fast'"),
        ({"train": 3}, r"config\.train=3"),
    ],
)
def test_wrong_settings_of_a_recipe(recipe, settings, message):
    with pytest.raises(UserError, match=message) as error:
        api.recipe(recipe[0], **settings)
    assert "\n" not in str(error.value)


def test_recipes_by_name_and_wrong_calls(recipe, tmp_path):
    assert api.recipe("tiny_ocr", sample={"steps": 3}).sample.steps == 3
    with pytest.raises(UserError, match=r"did you mean configs/tiny_ocr\.py"):
        api.recipe("tiny_orc")
    (tmp_path / "broken.py").write_text("def get_config():\n    return 1 / 0\n")
    with pytest.raises(UserError, match="division by zero"):
        api.recipe(tmp_path / "broken.py")
    with pytest.raises(UserError, match="epochs=0"):
        api.train(api.recipe(recipe[0], epochs=0))
    with pytest.raises(UserError, match="'onnx'"):
        api.export(tmp_path, tmp_path / "out", "onnx")
    errors = []

    def elsewhere():
        try:
            api.train(api.recipe(recipe[0]))
        except UserError as error:
            errors.append(str(error))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert "main thread" in errors[0]

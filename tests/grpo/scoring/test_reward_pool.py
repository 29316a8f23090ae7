"""The pools of a recipe, and the folders of users' modules."""

import importlib.util
import types

import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags

from configs.defaults import defaults
from grpo.scoring.reward_pool import check_groups, module_folders, open_pool
from grpo.scoring.scored_prompts import targets_check
from rewards.base import PromptRecord, Traits
from rewards.ocr.characters import readable_characters
from rewards.ocr.text_match import normalise
from tests.rewards import own_rewards, pool_rewards
from tests.rewards.drawing import filled, video
from tests.rewards.serving import TOKEN, serving
from wan_jax.command_line.cli import UserError

RECORD = PromptRecord((), "sign", {}, 24.0)


def reward_of(**changes):
    c = defaults().reward
    c.workers = 1
    c.update(changes)
    return c


@pytest.fixture
def red(tmp_path, monkeypatch):
    """A module in the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cwd_red.py").write_text(
        "class Red:\n    def score(self, video, request):\n"
        "        return {'first': video[0].mean(), 'fps': request.fps}\n"
    )
    return {"red": "cwd_red:Red"}


def test_a_reward_of_the_user_alone(red):
    with open_pool(reward_of(own=red), {"red": 1.0}) as pool:
        scores = pool.submit(filled(3, 5), [RECORD] * 2).result()
    assert scores.values.tolist() == [27, 29] and scores.parts["red.first"].tolist() == [3, 5]
    with pytest.raises(UserError, match=r"cwd_red.*'Blue'") as error:
        open_pool(reward_of(own={"red": "cwd_red:Blue"}), {"red": 1.0})
    assert len(str(error.value).splitlines()) == 1


def test_two_readers_of_one_text():
    config = reward_of(reader_two="rapidocr_v4", workers=0, rule="confident", max_frames=2)
    if importlib.util.find_spec("rapidocr_onnxruntime") is None:
        with pytest.raises(UserError, match="rapidocr-onnxruntime"):
            open_pool(config, {"ocr": 1.0})
        return
    with open_pool(config, {"ocr": 1.0}) as pool:
        scores = pool.submit(video("HELLO")[None], [("HELLO",)]).result()
    parts = {name: values[0] for name, values in scores.parts.items()}
    assert scores.values[0] == min(parts["ocr.reader_one"], parts["ocr.reader_two"]) > 0.5
    check = targets_check(config)
    assert check is not None and check(("HELLO",)) is None
    known, more = (
        set("".join(map(normalise, readable_characters(name))))
        for name in ("rapidocr_v4", "rapidocr")
    )
    with pytest.raises(ValueError, match="rapidocr_v4"):
        check((min(more - known),))


def test_with_a_named_server_and_text_servers(red, monkeypatch):
    """Three pools: text on a server, the user's reward in a process, a reward on another server."""
    pytest.importorskip("fastapi")
    monkeypatch.setenv("REWARD_TOKEN", TOKEN)
    about = {"name": "ocr", "rule": "spelling", "engine": "rapidocr", "max_frames": 9}
    weights = {"motion": 0.0, "ocr": 0.0, "red": 1.0, "va": 0.0}
    with (
        serving(pool_rewards.Targets, about=about) as text,
        serving(lambda: own_rewards.Fixed({"a": 1.0, "b": 2.0}), about={"name": "va"}) as broken,
    ):
        config = reward_of(own=red, servers=(text, f"va={broken}"), patience=2.0, retries=0)
        with open_pool(config, weights) as pool:
            scores = pool.submit(filled(3, 5), [RECORD] * 2).result()
    assert scores.values.tolist() == [27, 29] and scores.parts["ocr"].tolist() == [1, 1]
    # a dict is not a `Score`: this server does not adapt it
    assert (
        np.isnan(scores.parts["va"]).all() and "instead of a Score" in scores.part_errors["va"][0]
    )
    assert set(scores.parts) == {"motion", "ocr", "red", "red.first", "red.fps", "va"}


def test_modules_are_looked_for_next_to_the_recipe_and_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert module_folders() == (str(tmp_path),)
    values = flags.FlagValues()
    recipe = tmp_path / "recipes" / "a.py"
    recipe.parent.mkdir()
    recipe.write_text("from configs.defaults import defaults as get_config\n")
    argv = ["x", f"--config={recipe}"]
    config_flags.DEFINE_config_file("config", None, flag_values=values, sys_argv=argv)
    values(argv)
    monkeypatch.setattr(flags, "FLAGS", values)
    assert module_folders() == (str(recipe.parent), str(tmp_path))


def test_groups_that_processes_would_split_are_refused():
    """Four groups of four videos, in batches of eight or two."""

    def check(rows, batch=8, groupwise=True):
        pool = types.SimpleNamespace(traits=Traits(groupwise=groupwise))
        sample = types.SimpleNamespace(batch_size=batch, group_size=4, groups=4)
        check_groups(pool, types.SimpleNamespace(sample=sample), np.array(rows, int))

    check(range(8))
    check(range(4, 8))
    check(range(2), batch=2)  # a group from two batches
    check([])  # a process that scores nothing
    check([0, 1], groupwise=False)
    for rows, batch in (([0, 1], 8), ([0, 1, 2, 3, 4, 5], 8), ([1], 2)):
        with pytest.raises(UserError, match=f"batch_size={batch}"):
            check(rows, batch)

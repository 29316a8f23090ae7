"""Training runs with data: an anchor of a method, and a warm start on data alone."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from grpo.encode_clips import Wanted, encode
from tests.grpo import tiny_run
from tests.grpo.here import train_here
from tests.grpo.tiny_run import MEASURES, PICTURE, assert_same, newest, result, write_recipe
from wan_jax.errors import UserError

FEW = ("eval.num_prompts=2", "eval.previews=1")  # evaluations are not the subject
METRICS, EVALUATIONS = "metrics.jsonl", "evals.jsonl"


def write_data(model, folder, words=("sea", "sky", "sun")):
    """Encode a random picture for each word; return the folder of the data."""
    src = folder / "src"
    src.mkdir(parents=True)
    for i, word in enumerate(words):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 32, 3), np.uint8)
        Image.fromarray(pixels).save(src / f"{word}.png")
        (src / f"{word}.txt").write_text(f'A sign that says "{word}".')
    encode(Wanted(str(model), str(folder / "data"), str(src), height=16, width=32))
    return folder / "data"


@pytest.fixture(scope="module")
def data(model, tmp_path_factory):
    return write_data(model, tmp_path_factory.mktemp("data"))


def lines_of(run, name) -> list[dict]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def message(*args) -> str:
    with pytest.raises(UserError) as error:
        train_here(*args)
    return str(error.value)


@pytest.mark.slow
def test_a_run_with_an_anchor_resumes_bit_for_bit(model, data, tmp_path):
    """Flow-GRPO with data of another size than its videos; also from a copy of the data elsewhere."""
    common = (*MEASURES, *PICTURE, "data.weight=0.5", "data.batch_size=2", "eval.every=1")
    common += FEW
    results = []
    for name, ends in (("whole", (2,)), ("parts", (1, 2))):
        folder = tmp_path / name
        folder.mkdir()
        config, run = write_recipe(model, folder)
        for end in ends:
            path = data
            if end == 2 and name == "parts":
                path = shutil.copytree(data, tmp_path / "moved")
            train_here(config, *common, f"data.path={path}", f"epochs={end}")
        results.append(result(run))
        for record in lines_of(run, METRICS):
            assert record["data_error"] > 0 and 0 < record["data_share"] < 1
            assert record["reward_mean"] is not None and record["updates"] == 2
    assert_same(*results)

    # other data are refused, by content
    other = write_data(model, tmp_path / "other", ("sea", "sky", "moon"))
    refused = message(config, *common, f"data.path={other}", "epochs=3")
    assert f"data.path: '{tmp_path / 'moved'} (" in refused and f"{other} (" in refused
    refused = message(config, *common, "epochs=3")  # and none
    assert "data.path" in refused


@pytest.mark.slow
def test_a_warm_start_on_data_alone(model, data, tmp_path, capsys):
    """Nothing is sampled or scored between evaluations; it learns the data, and resumes."""
    common = (*MEASURES, *PICTURE, "train.method=sft", "train.timesteps=2", "data.only=True")
    common += (f"data.path={data}", "data.batch_size=3", "train.learning_rate=0.01", "eval.every=6")
    common += ("train.updates_per_epoch=3",)  # which would not divide the batches of a rollout
    common += FEW
    results = []
    for name, ends in (("whole", (8,)), ("parts", (3, 8))):
        folder = tmp_path / name
        folder.mkdir()
        config, run = write_recipe(model, folder)
        for end in ends:
            train_here(config, *common, f"epochs={end}")
        results.append((newest(run), tiny_run.arrays_of(run), lines_of(run, METRICS)))
    whole, parts = results
    assert whole[0] == parts[0] == 8
    for key, array in whole[1].items():
        np.testing.assert_array_equal(array, parts[1][key], err_msg=key)
    errors = [[record["flow_error"] for record in records] for _, _, records in results]
    assert errors[0] == errors[1]
    # three pairs at three levels each time: the noise of the mean is less than what is learnt
    assert np.mean(errors[0][-3:]) < 0.9 * np.mean(errors[0][:3])
    for record in whole[2]:
        assert record["evaluations"] == record["videos"] == 0 and record["updates"] == 3
        assert "reward_mean" not in record and "data_error" not in record
    evaluations = lines_of(tmp_path / "whole" / "run", EVALUATIONS)
    assert [record["epoch"] for record in evaluations] == [0, 6, 8]
    assert (tmp_path / "whole" / "run" / "report.html").exists()
    out = capsys.readouterr().out
    assert "epoch 1/8: error on data" in out and "data: 3 items of 1 x 16 x 32" in out
    assert "rollout step" not in out and "trained parameters, data alone" in out


def test_mistakes_before_any_work(model, data, recipe, tmp_path):
    """Settings, and folders that are no data or damaged."""
    config, run = recipe
    common = (*MEASURES, *PICTURE, "train.timesteps=2")
    assert "data.path=''" in message(config, *common, "data.only=True", "train.method=sft")
    path = f"data.path={data}"
    assert "train.method=grpo" in message(config, *common, path, "data.only=True")
    guided = ("train.method=sft", "train.guided=True", "data.only=True")
    assert "train.guided=True" in message(config, *common, path, *guided)
    assert "data.json" in message(config, *common, f"data.path={tmp_path}")
    damaged = shutil.copytree(data, tmp_path / "damaged")
    (damaged / "00000_text.npy").write_bytes(b"")
    found = message(config, *common, f"data.path={damaged}")
    assert f"data.path={damaged}" in found and "00000_text.npy has 0 bytes" in found
    assert newest(run) is None

"""Training runs with data: an anchor of a method, and training on data alone: a warm start, given pairs
and given ratings.
"""

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
    """Encode a random picture for each word, NAME/WORD.png with the caption for WORD; return the folder
    of the data.
    """
    src = folder / "src"
    for i, word in enumerate(words):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 32, 3), np.uint8)
        file = src / f"{word}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)
        file.with_suffix(".txt").write_text(f'A sign that says "{file.stem}".')
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
@pytest.mark.parametrize(
    "settings",
    [
        (
            "train.method=grpo",
            "data.noise=rollout",
            "sample.sde_window=spaced",  # steps 0 and 2
            "sample.steps=4",
            "sample.sde_range=(0,4)",
        ),
        ("train.method=dgpo", "train.timesteps=2"),
    ],
    ids=["ddrl", "dgpo"],
)
def test_methods_with_an_anchor_of_their_own_noise_resume_bit_for_bit(model, tmp_path, settings):
    """DDRL's data term takes the noise of the rollout, DGPO's levels are drawn for the data."""
    data = write_data(model, tmp_path, ("sea", "sky"))
    size = ("sample.height=16", "sample.width=32", "data.weight=0.5", "data.batch_size=2")
    common = (*MEASURES, *PICTURE, *FEW, *size, *settings, f"data.path={data}", "eval.every=2")
    results = []
    for name, ends in (("whole", (2,)), ("parts", (1, 2))):
        folder = tmp_path / name
        folder.mkdir()
        config, run = write_recipe(model, folder)
        for end in ends:
            train_here(config, *common, f"epochs={end}")
        results.append((tiny_run.arrays_of(run), lines_of(run, METRICS)))
    whole, parts = results
    for key, array in whole[0].items():
        np.testing.assert_array_equal(array, parts[0][key], err_msg=key)
    errors = [[record["data_error"] for record in records] for _, records in results]
    assert errors[0] == errors[1] and all(error > 0 for error in errors[0])


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


def write_labels(path, lines):
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.fixture(scope="module")
def labelled(model, tmp_path_factory):
    """(folder of four pictures of two prompts, labels by method)."""
    folder = tmp_path_factory.mktemp("labelled")
    data = write_data(model, folder, ("a/sea", "b/sea", "a/sky", "b/sky"))
    pairs = [{"preferred": f"a/{w}.png", "rejected": f"b/{w}.png"} for w in ("sea", "sky")]
    scores = {"a/sea": 1.0, "b/sea": 0.0, "a/sky": 0.75, "b/sky": 0.25}
    ratings = [{"file": f"{name}.png", "score": score} for name, score in scores.items()]
    dpo, tgo = (folder / f"{name}.jsonl" for name in ("pairs", "ratings"))
    return data, {"dpo": write_labels(dpo, pairs), "tgo": write_labels(tgo, ratings)}


@pytest.mark.slow
@pytest.mark.parametrize("method, share", [("dpo", "preferred"), ("tgo", "agreed")])
def test_training_on_given_labels(model, labelled, tmp_path, capsys, method, share):
    """Resumed bit for bit, also with a copy of the labels; others are refused."""
    data, labels = labelled
    common = (*MEASURES, *PICTURE, f"train.method={method}", "train.timesteps=2", "data.only=True")
    common += (
        f"data.path={data}",
        "data.batch_size=3",
        "train.learning_rate=0.003",
        "eval.every=1",
    )
    common += ("train.updates_per_epoch=3", *FEW)
    results = []
    for name, ends in (("whole", (3,)), ("parts", (1, 3))):
        folder = tmp_path / name
        folder.mkdir()
        config, run = write_recipe(model, folder)
        for end in ends:
            file = labels[method]
            if name == "parts" and end == 3:
                file = shutil.copy(file, tmp_path / "moved.jsonl")
            train_here(config, *common, f"data.labels={file}", f"epochs={end}")
        results.append(result(run))
    assert_same(*results)
    records = lines_of(run, METRICS)
    assert records[0][f"{share}_min"] == 0, "the first update compares the base model with itself"
    if method == "dpo":  # to tell each picture from a median takes a random model longer
        assert np.mean([record[share] for record in records]) > 0.6
    assert [record["epoch"] for record in lines_of(run, EVALUATIONS)] == [0, 1, 2, 3]
    out = capsys.readouterr().out
    assert "4 items of 1 x 16 x 32" in out and "of them (" in out

    lines = [json.loads(line) for line in labels[method].read_text().splitlines()]
    other = write_labels(tmp_path / "other.jsonl", lines[:-1] if method == "tgo" else lines[:1])
    refused = message(config, *common, f"data.labels={other}", "epochs=4")
    assert f"data.labels: '{tmp_path / 'moved.jsonl'} (" in refused and f"{other} (" in refused


def test_mistakes_before_any_work(model, data, recipe, tmp_path):
    """Settings, and folders that are no data or damaged."""
    config, run = recipe
    common = (*MEASURES, *PICTURE, "train.timesteps=2")
    assert "data.path=''" in message(config, *common, "data.only=True", "train.method=sft")
    path = f"data.path={data}"
    assert "train.method=grpo" in message(config, *common, path, "data.only=True")
    forgotten = message(config, *common, "data.weight=1")
    assert "data.weight=1 is that of data" in forgotten and "encode_clips" in forgotten
    labels = (path, "data.labels=pairs.jsonl")
    for others in ((), ("train.method=dpo",), ("train.method=sft", "data.only=True")):
        assert "(dpo, tgo)" in (said := message(config, *common, *labels, *others))
        assert "data.labels=pairs.jsonl is read with" in said
    guided = ("train.method=sft", "train.guided=True", "data.only=True")
    assert "train.guided=True" in message(config, *common, path, *guided)
    endless = (path, "data.only=True", "train.method=sft", "budget.evaluations=9")
    assert "budget.evaluations=9 with config.data.only" in message(config, *common, *endless)
    alone = (path, "data.only=True", "train.method=dpo")
    assert "data.labels=''" in message(config, *common, *alone)
    same = {"preferred": "sea.png", "rejected": "sea.png"}
    labels = write_labels(tmp_path / "labels.jsonl", [same | {"rejected": "sky.png"}])
    found = message(config, *common, *alone, f"data.labels={labels}")
    assert f"data.labels={labels}, line 1: 'sea.png' and 'sky.png' have different" in found
    assert "data.json" in message(config, *common, f"data.path={tmp_path}")
    damaged = shutil.copytree(data, tmp_path / "damaged")
    (damaged / "00000_text.npy").write_bytes(b"")
    found = message(config, *common, f"data.path={damaged}")
    assert f"data.path={damaged}" in found and "00000_text.npy has 0 bytes" in found
    assert newest(run) is None

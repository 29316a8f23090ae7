"""Weights & Biases offline and MLflow in a local store: numbers, previews, settings, resumed runs."""

import json

import numpy as np
import pytest

from configs.defaults import defaults
from grpo.records import trackers
from grpo.records.run_log import RunLog
from wan_jax.command_line.cli import UserError


def settings(**keys):
    log = defaults().log
    for key, value in keys.items():
        section, name = key.split("_")
        log[section][name] = value
    return log


def attempt(folder, log, epochs, resume=None):
    """Writes epochs as a run would, with a sheet of pictures after the first and of clips after the
    others.
    """
    run = RunLog(folder, resume, log)
    run.config({"seed": 3, "train": {"learning_rate": 0.5}, "epochs": max(epochs)})
    for e in epochs:
        run.epoch({"epoch": e, "loss": e / 10, "bad": float("nan"), "seconds": {"sample": 1.5}})
        run.evaluation(
            {"epoch": e, "reward": e / 5, "prompts": ["a"], "texts": ["b"]},
            np.full((2, 1 if e == 1 else 5, 4, 6, 3), e, np.uint8),
        )
    run.close()
    return json.loads((folder / "trackers.json").read_text())


def test_a_missing_package_is_named(monkeypatch):
    trackers.check(settings())
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda _: None)
    trackers.check(settings())
    for key, fix in (
        ("wandb_project", r"config.log.wandb.project=x .*pip install -e '.\[wandb\]'"),
        ("mlflow_uri", r"config.log.mlflow.uri=x .*pip install -e '.\[mlflow\]'"),
    ):
        with pytest.raises(UserError, match=fix):
            trackers.check(settings(**{key: "x"}))


def test_without_trackers_nothing_is_remembered(tmp_path):
    log = RunLog(tmp_path, None, settings())
    log.epoch({"epoch": 1, "loss": 0.5})
    log.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]


def test_mlflow(tmp_path, monkeypatch, capsys):
    mlflow = pytest.importorskip("mlflow", reason="needs pip install -e '.[mlflow]'")
    pytest.importorskip("sqlalchemy", reason="needs pip install -e '.[mlflow]'")
    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path / 'store.db'}"
    log = settings(mlflow_uri=uri, mlflow_experiment="words")
    first = attempt(tmp_path / "one", log, (1, 2))
    second = attempt(tmp_path / "one", log, (2, 3), resume=1)
    assert first == second and attempt(tmp_path / "one", log, (1,)) != first, (
        "a new start is a new run"
    )
    client = mlflow.MlflowClient(tracking_uri=uri)
    run = client.get_run(first["mlflow"]["id"])
    assert (
        run.info.status == "FINISHED" and run.data.tags["mlflow.runName"] == f"{tmp_path.name}/one"
    )
    assert client.get_experiment(run.info.experiment_id).name == "words"
    assert run.data.params["train.learning_rate"] == "0.5" and run.data.params["epochs"] == "2"
    history = {
        tag: {m.step: m.value for m in client.get_metric_history(run.info.run_id, tag)}
        for tag in run.data.metrics
    }
    assert history == {
        "train/loss": {1: 0.1, 2: 0.2, 3: 0.3},
        "train/seconds/sample": dict.fromkeys((1, 2, 3), 1.5),
        "eval/reward": {1: 0.2, 2: 0.4, 3: 0.6},
    }
    files = {f.path for f in client.list_artifacts(run.info.run_id, "eval/previews")}
    names = {f"eval/previews/epoch_00000{n}" for n in ("1.png", "2.gif", "3.gif")}
    assert files == names | {"eval/previews/000", "eval/previews/001"}
    files = {f.path for f in client.list_artifacts(run.info.run_id, "eval/previews/001")}
    assert files == {f"eval/previews/001/epoch_00000{n}" for n in ("1.png", "2.mp4", "3.mp4")}
    kept = mlflow.artifacts.download_artifacts(
        run_id=run.info.run_id, artifact_path="config.json", tracking_uri=uri
    )
    with open(kept) as file:
        assert json.load(file) == {"seed": 3, "train.learning_rate": 0.5, "epochs": 3}
    capsys.readouterr()
    log = RunLog(tmp_path / "two", None, settings(mlflow_uri=uri))
    client.delete_run(json.loads((tmp_path / "two" / "trackers.json").read_text())["mlflow"]["id"])
    log.epoch({"epoch": 1, "loss": 0.5})
    assert (
        "did not take it" in capsys.readouterr().out
        and (tmp_path / "two" / "metrics.jsonl").is_file()
    )


def test_mlflow_that_cannot_be_reached(tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="needs pip install -e '.[mlflow]'")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UserError, match=r"config\.log\.mlflow\.uri=http://127\.0\.0\.1:9: "):
        RunLog(tmp_path, None, settings(mlflow_uri="http://127.0.0.1:9"))


def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="needs pip install -e '.[wandb]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    log = settings(wandb_project="words")
    first = attempt(tmp_path / "one", log, (1, 2))
    assert first["wandb"]["project"] == "words"
    assert attempt(tmp_path / "one", log, (2, 3), resume=1) == first
    assert attempt(tmp_path / "one", settings(wandb_project="other"), (3,), resume=2) != first
    run = first["wandb"]["id"]
    runs = sorted((tmp_path / "one" / "wandb").glob(f"offline-run-*-{run}"))
    assert runs and all((folder / f"run-{run}.wandb").stat().st_size for folder in runs)
    stored = b"".join((folder / f"run-{run}.wandb").read_bytes() for folder in runs)
    assert b"train/loss" in stored and b"eval/reward" in stored and b"train.learning_rate" in stored
    names = {
        p.name.split("_")[1] + p.suffix for folder in runs for p in folder.rglob("eval/previews_*")
    }
    assert names == {"1.png", "2.gif", "3.gif"}
    names = {
        p.name.split("_")[1] + p.suffix
        for folder in runs
        for p in folder.rglob("eval/previews/001_*")
    }
    assert names == {"1.png", "2.mp4", "3.mp4"} and b"reward" in stored

"""Trackers print and store no password, and a package that cannot be imported is one message."""

import json
import sys
import types

import pytest

from configs.defaults import defaults
from grpo.records import trackers
from grpo.records.trackers import masked
from wan_jax.command_line.cli import UserError

SECRET = "s3cr3t"


@pytest.mark.parametrize(
    "text, expected",
    [
        (f"http://user:{SECRET}@host:5000/x", "http://***@host:5000/x"),
        (f"https://{SECRET}@host", "https://***@host"),
        (
            f"postgresql+psycopg2://u:{SECRET}@ {SECRET}".replace(f"@ {SECRET}", "@h/db"),
            "postgresql+psycopg2://***@h/db",
        ),
        (f"at http://u:p@{SECRET}@host, http://a:{SECRET}@b/", "at http://***@host, http://***@b/"),
        (
            f"postgresql://h/db?user=u&password={SECRET}&x=1",
            "postgresql://h/db?user=u&password=***&x=1",
        ),
        ("sqlite:////home/me@here/store.db", "sqlite:////home/me@here/store.db"),
        ("http://host:5000/?mail=a@b", "http://host:5000/?mail=a@b"),
        ("me@host", "me@host"),
    ],
)
def test_masked(text, expected):
    assert masked(text) == expected and SECRET not in masked(text)


class Refusing:
    """A client of an MLflow server that refuses all but a run; its errors contain the address."""

    def __init__(self, tracking_uri):
        self.uri, self.sent = tracking_uri, []

    def get_experiment_by_name(self, name):
        if self.uri.endswith("closed"):
            raise OSError(f"cannot reach {self.uri}")

    def create_experiment(self, name):
        return "1"

    def create_run(self, experiment, run_name):
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id="7"))

    def log_dict(self, run, values, name):
        self.sent.append(json.dumps(values))
        raise OSError(f"{self.uri} refused")

    log_batch = set_terminated = lambda self, *_, **kwargs: self.log_dict(*_, str(kwargs), "")


@pytest.fixture
def mlflow(monkeypatch):
    module = types.SimpleNamespace(
        exceptions=types.SimpleNamespace(MlflowException=RuntimeError), MlflowClient=Refusing
    )
    entities = types.SimpleNamespace(Metric=lambda *args: args, Param=lambda *args: args)
    monkeypatch.setitem(sys.modules, "mlflow", module)
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)


def test_mlflow_shows_no_password(mlflow, tmp_path, capsys):
    log, address = defaults().log, f"http://user:{SECRET}@host:5000"
    log.mlflow.uri = address
    (tracker,) = trackers.open_trackers(tmp_path, log, False)
    tracker.config(
        {
            "log.mlflow.uri": address,
            "command": f"python --config.log.mlflow.uri={address}",
            "seed": 3,
        }
    )
    tracker.numbers({"train/loss": 0.5}, 1)
    tracker.close()
    (again,) = trackers.open_trackers(tmp_path, log, False)
    assert (
        trackers._stored_id(
            tmp_path, "mlflow", {"uri": masked(address), "experiment": log.mlflow.experiment}
        )
        == again.run
    )
    out = (
        "".join(capsys.readouterr())
        + (tmp_path / "trackers.json").read_text()
        + "".join(tracker.client.sent)
    )
    assert SECRET not in out and out.count("MLflow at http://***@host:5000 did not take it") == 4
    log.mlflow.uri = address + "/closed"
    with pytest.raises(
        UserError, match=r"config\.log\.mlflow\.uri=http://\*\*\*@host:5000/closed: "
    ) as error:
        trackers.open_trackers(tmp_path, log, False)
    assert SECRET not in str(error.value)


def test_an_id_stored_by_an_address_with_its_password_is_found(tmp_path):
    stored = {"mlflow": {"uri": f"http://u:{SECRET}@h", "id": "7"}}
    (tmp_path / "trackers.json").write_text(json.dumps(stored))
    assert trackers._stored_id(tmp_path, "mlflow", {"uri": "http://***@h"}) == "7"


@pytest.mark.parametrize("package", ["wandb", "mlflow"])
def test_a_package_that_cannot_be_imported(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)  # importing it raises ModuleNotFoundError
    log = defaults().log
    log.wandb.project, log.mlflow.uri = ("x", "") if package == "wandb" else ("", "x")
    with pytest.raises(
        UserError,
        match=rf"config\.log\.{package} needs a package.*pip install -e '\.\[{package}\]'",
    ):
        trackers.open_trackers(tmp_path, log, False)

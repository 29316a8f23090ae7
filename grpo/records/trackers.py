"""Where a run's numbers and previews go beside its own files: TensorBoard, Weights & Biases,
MLflow.

A sink takes numbers by tag ('train/loss'), a sheet of previews and the settings. The packages of
the last two are imported where they are asked for. A run that is resumed continues their runs:
`TRACKERS` in the run's folder has the ids. What a resumed run computes again is the same to the
bit: Weights & Biases keeps what it has, MLflow has it twice.
"""

import dataclasses
import importlib
import importlib.util
import json
import math
import os
import pathlib
import re
import tempfile
import time
from collections.abc import Mapping
from typing import Protocol

from grpo.records.run_files import read_json, write_atomically
from rewards.packages import import_problem
from wan_jax.errors import UserError

TRACKERS = "trackers.json"
# by default it waits minutes
QUICK = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
PARAMETER = 6000  # characters of a parameter's value that MLflow takes
# user:password of scheme://user:password@host, up to the last @ of the host's part; ?password=...
SECRET = re.compile(
    r"(://)[^/\s?#]*(?=@)|([?&;][\w-]*(?:password|passwd|pwd|token|secret|key)=)[^&;\s'\"]*",
    re.IGNORECASE,
)
BATCH = 1000  # metrics that MLflow takes at once, and ten times as many as parameters


@dataclasses.dataclass(frozen=True)
class Sheet:
    """Previews on one picture, or as an animation of it."""

    data: bytes
    suffix: str  # .png or .gif
    height: int
    width: int


class Sink(Protocol):
    def config(self, values: dict) -> None:
        """The settings, flat: {'train.learning_rate': 1e-4}."""
        ...

    def numbers(self, values: Mapping[str, float], epoch: int) -> None: ...
    def previews(self, tag: str, sheet: Sheet, epoch: int) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """first: the epoch from which on records of an earlier attempt are forgotten."""

    def __init__(self, folder: pathlib.Path, first: int):
        # a second or more where PyTorch is installed, which it then imports
        from tensorboardX import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=first)

    def config(self, values: dict) -> None: ...

    def numbers(self, values: Mapping[str, float], epoch: int) -> None:
        for tag, value in values.items():
            self.writer.add_scalar(tag, value, epoch)
        self.writer.flush()

    def previews(self, tag: str, sheet: Sheet, epoch: int) -> None:
        from tensorboardX.proto.summary_pb2 import Summary

        image = Summary.Image(
            height=sheet.height, width=sheet.width, colorspace=3, encoded_image_string=sheet.data
        )
        self.writer.file_writer.add_summary(
            Summary(value=[Summary.Value(tag=tag, image=image)]), epoch
        )

    def close(self) -> None:
        self.writer.close()


class WandB:
    """Weights & Biases; whether it is online, WANDB_MODE and `wandb login` say."""

    def __init__(self, folder: pathlib.Path, project: str, entity: str, resume: bool):
        wandb = imported("wandb")
        self.wandb, key = wandb, {"project": project, "entity": entity}
        known = _known(folder, "wandb", key) if resume else None
        try:
            self.run = wandb.init(
                project=project,
                entity=entity or None,
                name=_name(folder),
                dir=str(folder),
                id=known,
                resume="allow" if known else None,
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.errors.Error as error:
            raise UserError(
                f"config.log.wandb.project={project}: {masked(str(error))}; log in with `wandb "
                "login`, or set WANDB_MODE=offline and send the run later with `wandb sync`"
            ) from None
        _remember(folder, "wandb", key, self.run.id)
        self.last = self.run.step  # of what an earlier attempt logged

    def config(self, values: dict) -> None:
        self.run.config.update(
            {
                key: masked(value) if isinstance(value, str) else value
                for key, value in values.items()
            },
            allow_val_change=True,
        )

    def numbers(self, values: Mapping[str, float], epoch: int) -> None:
        self._log(values, epoch)

    def previews(self, tag: str, sheet: Sheet, epoch: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, f"previews{sheet.suffix}")
            path.write_bytes(sheet.data)
            self._log(
                {
                    tag: self.wandb.Video(str(path), format="gif")
                    if sheet.suffix == ".gif"
                    else self.wandb.Image(str(path))
                },
                epoch,
            )

    def _log(self, values: Mapping, epoch: int) -> None:
        if epoch >= self.last:  # it refuses steps that lie behind
            self.run.log(dict(values), step=epoch)

    def close(self) -> None:
        self.run.finish()


class MLflow:
    """A tracking server or a local store. Where it does not take something in the middle of a run,
    that is printed and the run goes on: its own files have everything.
    """

    def __init__(self, folder: pathlib.Path, uri: str, experiment: str, resume: bool):
        for name, value in QUICK.items():
            os.environ.setdefault(name, value)
        mlflow = imported("mlflow")
        from mlflow.entities import Metric, Param

        self.errors, self.metric, self.param = (
            (mlflow.exceptions.MlflowException, OSError),
            Metric,
            Param,
        )
        self.uri, key = masked(uri), {"uri": masked(uri), "experiment": experiment}
        known = _known(folder, "mlflow", key) if resume else None
        try:
            self.client = mlflow.MlflowClient(tracking_uri=uri)
            if known:
                self.client.update_run(known, status="RUNNING")
            else:
                found = self.client.get_experiment_by_name(experiment)
                number = found.experiment_id if found else self.client.create_experiment(experiment)
                known = self.client.create_run(number, run_name=_name(folder)).info.run_id
        except (*self.errors, ImportError) as error:
            raise UserError(
                f"config.log.mlflow.uri={self.uri}: {masked(' '.join(str(error).split()))}"
            ) from None
        self.run, self.told = known, resume
        _remember(folder, "mlflow", key, known)

    def config(self, values: dict) -> None:
        values = {
            key: masked(value) if isinstance(value, str) else value for key, value in values.items()
        }
        self._send(self.client.log_dict, values, "config.json")
        if not self.told:  # parameters cannot change once they are there
            parameters = [self.param(k, str(v)[:PARAMETER]) for k, v in values.items()]
            for first in range(0, len(parameters), BATCH // 10):
                self._send(self.client.log_batch, params=parameters[first : first + BATCH // 10])
        self.told = True

    def numbers(self, values: Mapping[str, float], epoch: int) -> None:
        now = int(1000 * time.time())
        metrics = [
            self.metric(tag, value, now, epoch)
            for tag, value in values.items()
            if math.isfinite(value)
        ]
        for first in range(0, len(metrics), BATCH):
            self._send(self.client.log_batch, metrics=metrics[first : first + BATCH])

    def previews(self, tag: str, sheet: Sheet, epoch: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, f"epoch_{epoch:06d}{sheet.suffix}")
            path.write_bytes(sheet.data)
            self._send(self.client.log_artifact, str(path), tag)

    def close(self) -> None:
        self._send(self.client.set_terminated)

    def _send(self, call, *args, **kwargs) -> None:
        try:
            call(self.run, *args, **kwargs)
        except self.errors as error:
            print(
                f"warning: MLflow at {self.uri} did not take it: "
                f"{masked(' '.join(str(error).split()))[:300]}",
                flush=True,
            )


def masked(text: str) -> str:
    """The text without what comes before @ in a URL, and without passwords and tokens among its
    parameters.
    """
    return SECRET.sub(lambda found: f"{found[1] or found[2]}***", text)


def check(log) -> None:
    """Raises `UserError` where a tracker is asked for whose package is missing. log: `config.log`."""
    for package, key in (("wandb", "wandb.project"), ("mlflow", "mlflow.uri")):
        section, name = key.split(".")
        if log[section][name] and importlib.util.find_spec(package) is None:
            raise UserError(
                f"config.log.{key}={masked(log[section][name])} needs the package {package}: pip "
                f"install -e '.[{package}]'"
            )


def imported(package: str):
    """Raises `UserError` where the package is there and cannot be imported."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(
            import_problem(f"config.log.{package}", error, f"pip install -e '.[{package}]'")
        ) from None


def trackers(folder: pathlib.Path, log, resume: bool) -> list[Sink]:
    """Those that `config.log` asks for. resume: their runs of before go on. Raises `UserError` on
    one that cannot be reached.
    """
    found: list[Sink] = []
    if log.wandb.project:
        found.append(WandB(folder, log.wandb.project, log.wandb.entity, resume))
    if log.mlflow.uri:
        found.append(MLflow(folder, log.mlflow.uri, log.mlflow.experiment, resume))
    return found


def _name(folder: pathlib.Path) -> str:
    """Of a run, from its folder and the one that holds it: grpo.compare's end in cps/seed0."""
    return "/".join(folder.resolve().parts[-2:])


def _known(folder: pathlib.Path, name: str, key: dict) -> str | None:
    """The id of this folder's run at a tracker; None where it has none, or had it elsewhere."""
    entry = read_json(folder / TRACKERS).get(name)
    known = isinstance(entry, dict) and all(masked(str(entry.get(k))) == v for k, v in key.items())
    return entry.get("id") if known else None


def _remember(folder: pathlib.Path, name: str, key: dict, run: str) -> None:
    known = read_json(folder / TRACKERS) | {name: key | {"id": run}}
    write_atomically(folder / TRACKERS, (json.dumps(known, indent=1) + "\n").encode())

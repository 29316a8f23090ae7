"""Sends a run's numbers and previews to TensorBoard, Weights & Biases and MLflow.

A tracker takes numbers by tag ('train/loss'), a sheet of previews, each preview and the settings. The packages
of Weights & Biases and MLflow are imported only if they are used. A resumed run continues there
under its earlier id, which is stored in `TRACKERS` in the run's folder. Epochs that it computes
again have the same numbers: Weights & Biases keeps the first ones, MLflow has them twice.
"""

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
from typing import Any, Protocol

from grpo.records.previews import Preview, Sheet
from grpo.records.run_files import read_json, write_atomically
from rewards.base import import_problem
from wan_jax.errors import UserError

TRACKERS = "trackers.json"
# MLflow's defaults wait for minutes
MLFLOW_LIMITS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
# per request to MLflow
MLFLOW_METRICS, MLFLOW_PARAMETERS, MLFLOW_CHARACTERS = 1000, 100, 6000
# user:password of scheme://user:password@host, up to the last @ of the host's part; ?password=...
SECRET = re.compile(
    r"(://)[^/\s?#]*(?=@)|([?&;][\w-]*(?:password|passwd|pwd|token|secret|key)=)[^&;\s'\"]*",
    re.IGNORECASE,
)


class Tracker(Protocol):
    def config(self, values: dict) -> None:
        """Send the settings, flat: {'train.learning_rate': 1e-4}."""
        ...

    def numbers(self, values: Mapping[str, float], epoch: int) -> None: ...
    def previews(self, tag: str, sheet: Sheet, epoch: int) -> None:
        """Send several previews in one picture or animation."""
        ...

    def preview(self, tag: str, preview: Preview, epoch: int) -> None:
        """Send one preview in full size, or as large as the tracker can show it."""
        ...

    def close(self) -> None: ...


class TensorBoard:
    """Writes event files into `folder`; drops an earlier attempt's records from epoch `first` on."""

    def __init__(self, folder: pathlib.Path, first: int):
        # takes a second or more where PyTorch is installed, which it imports
        from tensorboardX import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=first)

    def config(self, values: dict) -> None: ...

    def numbers(self, values: Mapping[str, float], epoch: int) -> None:
        for tag, value in values.items():
            self.writer.add_scalar(tag, value, epoch)
        self.writer.flush()

    def previews(self, tag: str, sheet: Sheet, epoch: int) -> None:
        from tensorboardX.proto import summary_pb2

        # generated code, which has no annotations
        Summary: Any = summary_pb2.Summary  # pyright: ignore[reportAttributeAccessIssue]

        image = Summary.Image(
            height=sheet.height, width=sheet.width, colorspace=3, encoded_image_string=sheet.data
        )
        summary = Summary(value=[Summary.Value(tag=tag, image=image)])
        file_writer = self.writer.file_writer
        assert file_writer is not None, "the writer is open"
        file_writer.add_summary(summary, epoch)

    def preview(self, tag: str, preview: Preview, epoch: int) -> None:
        self.previews(tag, preview.small, epoch)  # it plays no videos

    def close(self) -> None:
        self.writer.close()


class WandB:
    """Sends to Weights & Biases; WANDB_MODE and `wandb login` decide whether it is online.

    Raises:
      UserError: the package cannot be imported, or the service refuses the run.
    """

    def __init__(self, folder: pathlib.Path, project: str, entity: str, resume: bool):
        self.wandb = import_tracker("wandb")
        key = {"project": project, "entity": entity}
        run_id = _stored_id(folder, "wandb", key) if resume else None
        try:
            self.run = self.wandb.init(
                project=project,
                entity=entity or None,
                name=_run_name(folder),
                dir=str(folder),
                id=run_id,
                resume="allow" if run_id else None,
                settings=self.wandb.Settings(console="off", silent=True),
            )
        except self.wandb.errors.Error as error:
            raise UserError(
                f"config.log.wandb.project={project}: {masked(str(error))}; log in with `wandb "
                "login`, or set WANDB_MODE=offline and send the run later with `wandb sync`"
            ) from None
        _store_id(folder, "wandb", key, self.run.id)
        self.first = self.run.step  # earlier steps are refused: a previous attempt logged them

    def config(self, values: dict) -> None:
        self.run.config.update(_masked_values(values), allow_val_change=True)

    def numbers(self, values: Mapping[str, float], epoch: int) -> None:
        if epoch >= self.first:
            self.run.log(dict(values), step=epoch)

    def previews(self, tag: str, sheet: Sheet, epoch: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, f"previews{sheet.suffix}")
            path.write_bytes(sheet.data)
            if sheet.suffix == ".gif":
                shown = self.wandb.Video(str(path), format="gif")
            else:
                shown = self.wandb.Image(str(path))
            self.numbers({tag: shown}, epoch)

    def preview(self, tag: str, preview: Preview, epoch: int) -> None:
        path, caption = str(preview.path), preview.caption
        if preview.path.suffix == ".mp4":
            shown = self.wandb.Video(path, caption=caption, format="mp4")
        else:
            shown = self.wandb.Image(path, caption=caption)
        self.numbers({tag: shown}, epoch)

    def close(self) -> None:
        self.run.finish()


class MLflow:
    """Sends to a tracking server, or writes to a local store.

    What is refused during the run is reported on standard output, and the run continues: its own
    files have everything.

    Raises:
      UserError: the package cannot be imported, or the server cannot be reached at the start.
    """

    def __init__(self, folder: pathlib.Path, uri: str, experiment: str, resume: bool):
        for name, value in MLFLOW_LIMITS.items():
            os.environ.setdefault(name, value)
        mlflow = import_tracker("mlflow")
        from mlflow.entities import (  # pyright: ignore[reportMissingImports], an extra
            Metric,
            Param,
        )

        self.metric, self.param = Metric, Param
        self.errors = (mlflow.exceptions.MlflowException, OSError)
        self.uri = masked(uri)
        key = {"uri": self.uri, "experiment": experiment}
        self.run = _stored_id(folder, "mlflow", key) if resume else None
        try:
            self.client = mlflow.MlflowClient(tracking_uri=uri)
            if self.run:
                self.client.update_run(self.run, status="RUNNING")
            else:
                found = self.client.get_experiment_by_name(experiment)
                number = found.experiment_id if found else self.client.create_experiment(experiment)
                info = self.client.create_run(number, run_name=_run_name(folder)).info
                self.run = info.run_id
        except (*self.errors, ImportError) as error:
            raise UserError(f"config.log.mlflow.uri={self.uri}: {_one_line(error)}") from None
        self.has_parameters = resume  # they cannot change once they are there
        _store_id(folder, "mlflow", key, self.run)

    def config(self, values: dict) -> None:
        values = _masked_values(values)
        self._send(self.client.log_dict, values, "config.json")
        if not self.has_parameters:
            parameters = [self.param(k, str(v)[:MLFLOW_CHARACTERS]) for k, v in values.items()]
            self._send_in_parts("params", parameters, MLFLOW_PARAMETERS)
        self.has_parameters = True

    def numbers(self, values: Mapping[str, float], epoch: int) -> None:
        now = int(1000 * time.time())
        finite = {tag: value for tag, value in values.items() if math.isfinite(value)}
        metrics = [self.metric(tag, value, now, epoch) for tag, value in finite.items()]
        self._send_in_parts("metrics", metrics, MLFLOW_METRICS)

    def previews(self, tag: str, sheet: Sheet, epoch: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, f"epoch_{epoch:06d}{sheet.suffix}")
            path.write_bytes(sheet.data)
            self._send(self.client.log_artifact, str(path), tag)

    def preview(self, tag: str, preview: Preview, epoch: int) -> None:
        self._send(self.client.log_artifact, str(preview.path), tag)

    def close(self) -> None:
        self._send(self.client.set_terminated)

    def _send_in_parts(self, kind: str, values: list, count: int) -> None:
        for first in range(0, len(values), count):
            self._send(self.client.log_batch, **{kind: values[first : first + count]})

    def _send(self, call, *args, **kwargs) -> None:
        try:
            call(self.run, *args, **kwargs)
        except self.errors as error:
            print(
                f"warning: MLflow at {self.uri} did not take it: {_one_line(error)[:300]}",
                flush=True,
            )


def masked(text: str) -> str:
    """Replace passwords by ***: what comes before @ in a URL, and tokens among its parameters."""
    return SECRET.sub(lambda found: f"{found[1] or found[2]}***", text)


def _masked_values(values: dict) -> dict:
    return {k: masked(v) if isinstance(v, str) else v for k, v in values.items()}


def _one_line(error: BaseException) -> str:
    return masked(" ".join(str(error).split()))


def check(settings) -> None:
    """Raise `UserError` if `config.log` asks for a tracker whose package is missing."""
    for package, key in (("wandb", "wandb.project"), ("mlflow", "mlflow.uri")):
        section, name = key.split(".")
        if settings[section][name] and importlib.util.find_spec(package) is None:
            raise UserError(
                f"config.log.{key}={masked(settings[section][name])} needs the package {package}: "
                f"pip install -e '.[{package}]'"
            )


def import_tracker(package: str):
    """Import an installed package. Raises `UserError` if that fails."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(
            import_problem(f"config.log.{package}", error, f"pip install -e '.[{package}]'")
        ) from None


def open_trackers(folder: pathlib.Path, settings, resume: bool) -> list[Tracker]:
    """Open the trackers that `config.log` asks for. Raises `UserError` if one cannot be reached.

    folder: of the run; settings: `config.log`; resume: whether to continue its earlier runs there.
    """
    opened: list[Tracker] = []
    if settings.wandb.project:
        opened.append(WandB(folder, settings.wandb.project, settings.wandb.entity, resume))
    if settings.mlflow.uri:
        opened.append(MLflow(folder, settings.mlflow.uri, settings.mlflow.experiment, resume))
    return opened


def _run_name(folder: pathlib.Path) -> str:
    """Return the last two parts of the run folder's path: those of grpo.compare end in cps/seed0."""
    return "/".join(folder.resolve().parts[-2:])


def _stored_id(folder: pathlib.Path, name: str, key: dict) -> str | None:
    """Return the id of this folder's run at a tracker; None if it has none under this key."""
    entry = read_json(folder / TRACKERS).get(name)
    if not isinstance(entry, dict):
        return None
    same = all(masked(str(entry.get(k))) == v for k, v in key.items())
    return entry.get("id") if same else None


def _store_id(folder: pathlib.Path, name: str, key: dict, run_id: str) -> None:
    entries = read_json(folder / TRACKERS) | {name: key | {"id": run_id}}
    write_atomically(folder / TRACKERS, (json.dumps(entries, indent=1) + "\n").encode())

"""`grpo.train` at its start: one run per folder, and errors that all processes learn of."""

import contextlib
import types

import pytest

from configs import tiny_ocr
from grpo import train
from wan_jax.command_line.cli import UserError
from wan_jax.storage.folder_lock import locked


@pytest.fixture
def c(tmp_path, monkeypatch):
    """The recipe of `train.main`, of a run with a model that does not exist."""
    c = tiny_ocr.get_config()
    c.run_dir, c.model.path = str(tmp_path / "run"), str(tmp_path / "none")
    given = types.SimpleNamespace(
        config=c,
        cluster="none",
        coordinator=None,
        num_processes=None,
        process_id=None,
        host_timeout=100,
        stage_timeout=0,
        join_timeout=300,
    )
    monkeypatch.setattr(train, "flags", types.SimpleNamespace(FLAGS=given))
    return c


def test_a_run_in_a_folder_in_use_is_refused_before_the_model_is_opened(c, tmp_path):
    with (
        locked(c.run_dir, "--config.run_dir"),
        pytest.raises(UserError, match=r"run is in use by process \d+ on"),
    ):
        train.main(None)
    with pytest.raises(UserError, match=r"none does not exist"):
        train.main(None)
    assert not (tmp_path / "run").exists()


def test_a_prompt_file_that_one_process_lacks_is_an_error_in_all(c, monkeypatch):
    errors = []

    @contextlib.contextmanager
    def joined(*_):
        try:
            yield
        except UserError as error:
            errors.append(str(error))
            raise

    monkeypatch.setattr(train.multihost, "joined", joined)
    c.prompts.train = "none.txt"
    with pytest.raises(UserError):
        train.main(None)
    assert "none.txt does not exist" in errors[0]

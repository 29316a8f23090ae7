"""A run has its folder for itself."""

import types

import pytest
from absl import flags

from configs import tiny_ocr
from grpo import train
from wan_jax.cli import UserError
from wan_jax.folder_lock import locked


def test_a_run_in_a_folder_in_use_is_refused_before_the_model_is_opened(tmp_path, monkeypatch):
    c = tiny_ocr.get_config()
    c.run_dir, c.model.path = str(tmp_path / "run"), str(tmp_path / "none")
    monkeypatch.setattr(train, "CONFIG", types.SimpleNamespace(value=c))
    flags.FLAGS.mark_as_parsed()
    with locked(c.run_dir, "--config.run_dir"), pytest.raises(UserError, match=r"run is in use by process \d+ on"):
        train.main(None)
    with pytest.raises(UserError, match=r"none does not exist"):
        train.main(None)
    assert not (tmp_path / "run").exists()

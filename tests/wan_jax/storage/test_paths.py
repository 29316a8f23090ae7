"""Paths with `~`, `..` and symlinks, and a destination that is not apart from its source."""

import re

import pytest

from wan_jax.command_line.cli import UserError
from wan_jax.storage.paths import check_apart, expand


def test_expand(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "a b")
    root = tmp_path.resolve()
    for text, wanted in (
        ("~/x", root / "x"),
        ("x/../y", root / "y"),
        ("x/", root / "x"),
        ("link/x", root / "a b" / "x"),
    ):
        assert expand(text) == wanted
    for bad in ("", "~nobody-of-this-name/x", "a\0b"):
        with pytest.raises(UserError, match=re.escape(repr(bad))):
            expand(bad)


def test_check_apart(tmp_path):
    (tmp_path / "model" / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "model")
    source = tmp_path / "model"
    for destination in ("model", "model/", "link", "link/../model"):
        with pytest.raises(UserError, match=f"{source.resolve()} .*--dst"):
            check_apart(source, f"{tmp_path}/{destination}")
    for destination, relation in (
        ("model/new", "inside"),
        ("link/inner/new", "inside"),
        (".", "contains"),
    ):
        path = expand(f"{tmp_path}/{destination}")
        with pytest.raises(UserError, match=f"{path} .*{relation}.*{source.resolve()}.*--dst"):
            check_apart(source, f"{tmp_path}/{destination}")
    for destination in ("other", "model2", "model/../model-b"):
        check_apart(tmp_path / "model", f"{tmp_path}/{destination}")

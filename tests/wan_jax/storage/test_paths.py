"""Paths with `~`, `..` and symlinks, and a destination that is not apart from its source."""

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
        with pytest.raises(UserError, match="cannot be used as a path"):
            expand(bad)


def test_check_apart(tmp_path):
    (tmp_path / "model" / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "model")
    for destination, relation in (
        ("model", "is the source"),
        ("model/", "is the source"),
        ("link", "is the source"),
        ("link/../model", "is the source"),
        ("model/new", "inside the source"),
        ("link/inner/new", "inside the source"),
        (".", "contains the source"),
    ):
        with pytest.raises(UserError, match=rf"{relation}.*another --dst"):
            check_apart(tmp_path / "model", f"{tmp_path}/{destination}")
    for destination in ("other", "model2", "model/../model-b"):
        check_apart(tmp_path / "model", f"{tmp_path}/{destination}")

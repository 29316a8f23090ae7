"""docs/reference/settings.md and `python -m grpo.settings`."""

import pathlib

import pytest

from grpo.settings import __main__ as command
from grpo.settings.reference import listing, markdown
from grpo.settings.schema import SETTINGS

ROOT = pathlib.Path(__file__).parents[3]


def test_the_page_is_up_to_date():
    """`python -m grpo.settings > docs/reference/settings.md` writes it."""
    assert (ROOT / "docs/reference/settings.md").read_text() == markdown()


def test_every_setting_has_a_row_with_its_type_default_and_range():
    rows = [line for line in markdown().splitlines() if line.startswith("| `")]
    assert sorted(row.split("`")[1] for row in rows) == sorted(SETTINGS)
    by_key = {row.split("`")[1]: [cell.strip() for cell in row.split(" | ")] for row in rows}
    assert by_key["sample.sde_range"][1:4] == [
        "tuple of whole numbers",
        "`(0, 19)`",
        "(first, last + 1); at least 0",
    ]
    assert by_key["train.ema_decay"][1:4] == ["number", "`0.9`", "at least 0 and below 1"]
    assert by_key["sample.max_step_std"][1:4] == ["number", "`None`", "above 0; `inf`; `None`"]
    assert by_key["run_dir"][1:4] == ["path", "`''`", "not empty"]
    assert by_key["run_dir"][4].endswith("*Continuing.* *Per process.* |")
    assert by_key["train.guided"][4].endswith("*Experimental.* |")
    assert by_key["train.objective"][4].endswith("*Experimental: dppo.* |")


def test_a_word_chooses_settings(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["settings", "KL_"])
    command.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| `")]
    assert len(rows) >= 8 and all("kl_" in row for row in rows)
    monkeypatch.setattr("sys.argv", ["settings", "zebra"])
    with pytest.raises(SystemExit, match="'zebra'"):
        command.main()


def test_the_listing_has_every_setting_in_100_columns(capsys, monkeypatch):
    lines = listing().splitlines()
    assert max(map(len, lines)) <= 100
    shown = [line.partition("=")[0] for line in lines if not line.startswith(" ")]
    assert shown == list(SETTINGS)
    monkeypatch.setattr("sys.argv", ["settings", "--plain", "train.advantage_std"])
    command.main()
    out = capsys.readouterr().out
    shown = [x.partition("=")[0] for x in listing("reward").splitlines() if not x.startswith(" ")]
    assert shown[0] == "reward.rule" and "train.temperature" in shown
    assert out == listing("train.advantage_std") and "group, global, max, none" in out

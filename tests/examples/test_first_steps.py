"""The notebook `examples/first_steps.ipynb`: its cells run, and it is stored without outputs."""

import json
import pathlib

import pytest

from tests.commands import ROOT
from tests.grpo import here, tiny_run

NOTEBOOK = json.loads((ROOT / "examples/first_steps.ipynb").read_text())
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_no_outputs_are_stored():
    assert len(CODE) >= 8 and len({cell["id"] for cell in NOTEBOOK["cells"]}) == len(
        NOTEBOOK["cells"]
    )
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in CODE)


@pytest.mark.slow
def test_the_cells_run(tmp_path, monkeypatch, capsys):
    """From the folder of the notebook, with fewer epochs and prompts, and a smaller, random model."""
    (tmp_path / "examples").mkdir()
    (tmp_path / "models").mkdir()
    (tmp_path / "models/tiny-wan").symlink_to(tiny_run.make_model(tmp_path))
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    monkeypatch.chdir(tmp_path / "examples")
    here.share(monkeypatch)
    names: dict = {"__name__": "__main__"}
    for number, cell in enumerate(CODE):
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
        if number == 0:
            assert {"EPOCHS", "GROUPS", "HELDOUT"} <= names.keys()
            names |= {"EPOCHS": 1, "GROUPS": 4, "HELDOUT": 2}
    assert pathlib.Path.cwd() == tmp_path
    run, before, after = names["run"], names["before"], names["after"]
    assert [record["epoch"] for record in run.epochs] == [1] and len(run.evaluations) == 2
    assert run.evaluations[0]["main"] == "redness" and "ocr" in run.epochs[0]["rewards"]
    assert (before.frames != after.frames).any() and before.prompts == after.prompts
    out = capsys.readouterr().out
    assert "redness: " in out and "spelling: " in out and "epoch 1: redness " in out
    assert (run.folder / "redness.safetensors").exists() and (run.folder / "report.html").exists()

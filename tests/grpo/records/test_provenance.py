"""Where a run's results come from."""

import json
import re

from grpo.records import provenance, run_log
from grpo.records.run_log import RunLog
from tests.grpo.specs import tiny_spec


def test_an_entry_for_each_start(tmp_path):
    spec = tiny_spec(**{"sample.sde": "cps", "model.attention": "chunked"})
    for resumed in (None, 3):
        log = RunLog(tmp_path, resumed)
        log.provenance(provenance.entry(spec, "python -m grpo.train", resumed or 0))
        log.close()
    first, second = run_log.read_starts(tmp_path)
    assert (first["epoch"], second["epoch"]) == (0, 3) and first[
        "command"
    ] == "python -m grpo.train"
    assert first["hardware"]["devices"].startswith("1 x ") and first["versions"]["jax"]
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", first["commit"] or "0" * 40)
    assert first["in_force"]["sample.noise_level"] == 0.8
    assert first["in_force"]["sample.max_step_std"] is None, (
        "no bound: infinite, which JSON has not"
    )
    assert "model.attention" not in first["in_force"], "it was given"
    assert "sample.guidance_2" not in first["in_force"], "there is one expert"
    log = RunLog(tmp_path)
    log.provenance({"epoch": 0})
    log.close()
    assert run_log.read_starts(tmp_path) == [{"epoch": 0}], "a new run begins its own"


def test_what_cannot_be_read_is_left_out(tmp_path, capsys):
    assert run_log.read_starts(tmp_path) == []
    for damaged in ("{", json.dumps({"starts": 3}), json.dumps({"starts": [3]})):
        (tmp_path / run_log.PROVENANCE).write_text(damaged)
        assert run_log.read_starts(tmp_path) == []
    assert "provenance.json" in capsys.readouterr().err

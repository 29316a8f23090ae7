"""The runs that are made to hack their reward: their settings, their tables, and the change outside of
the text.
"""

import json
import time
import types

import numpy as np
import pytest

from benchmarks import hacking, hacking_distance, hacking_tables
from grpo.compare import Method
from grpo.data.prompts import load_prompts
from grpo.records import run_log
from rewards.base import Score
from rewards.ocr.targets import parse_targets


@pytest.mark.parametrize("case", hacking.CASES, ids=lambda case: case.name)
def test_the_settings_of_every_case_are_valid(case):
    Method(case.name, case.recipe, case.settings).config()


class Reader:
    """Reads text in the left half of every picture."""

    def score(self, video, targets):
        return Score(1.0, "text", (0,), boxes=(((0.0, 0.0, 0.5, 1.0),),))


def test_the_distance_is_apart_for_text_and_the_rest():
    before = np.zeros((2, 1, 16, 64, 3), np.uint8)
    after = before.copy()
    after[0, :, :, :32], after[0, :, :, 32:] = 50, 4
    texts = [hacking_distance.text_mask(video, Reader()) for video in before]
    outside, inside = hacking_distance.distances(before, texts, after, Reader())
    assert outside.tolist() == [4.0, 0.0]
    np.testing.assert_allclose(inside, [(32 * 50 + 8 * 4) / 40, 0])  # boxes are grown by 8 pixels


def records(rewards, golds):
    """Return the evaluations of a run, ten epochs apart."""
    for n, (reward, gold) in enumerate(zip(rewards, golds)):
        half = {"reward": reward, "low": reward - 0.05, "high": reward + 0.05}
        whole = {"epoch": 10 * n, "num": 100, "rewards": [reward], "prompts": ["a"], "texts": [""]}
        measures = {"gold": [gold, 0.1], "dark": [0.1 + 0.01 * n, 0.02]}
        yield whole | half | {"choose": half, "report": half, "measures": measures, "seconds": 1.0}


def test_tables_name_the_epochs_that_proxy_gold_and_guard_choose(tmp_path):
    run = tmp_path / "proxy_clips" / "seed2"
    run.mkdir(parents=True)
    config = {
        "train": {"alarm_tolerance": 1.2},
        "reward": {"panel": ["dark"], "weights": {"ocr": 1.0}},
    }
    (run / run_log.CONFIG).write_text(json.dumps(config))
    lines = [json.dumps(e) for e in records((0.4, 0.6, 0.8, 0.9), (0.4, 0.7, 0.5, 0.3))]
    (run / run_log.EVALUATIONS).write_text("\n".join(lines) + "\n")
    epochs = [{"epoch": n, "seconds": {"total": 2.0}, "group_spread": 0.5} for n in range(1, 31)]
    (run / run_log.METRICS).write_text("\n".join(map(json.dumps, epochs)) + "\n")
    (tmp_path / "best_of.log").write_text(
        "4 of 8 candidates went on after 4 of 10 steps, at noise level 0.67: 30% of the model "
        "evaluations saved\nbest of 8: judge 0.812 on 16 prompt(s); all candidates 0.601\n"
    )
    hacking_tables.write(tmp_path)
    values = json.loads((tmp_path / hacking_tables.VALUES).read_text())
    (found,) = values["runs"]
    assert (found["case"], found["seed"], found["epochs"]) == ("proxy_clips", 2, 30)
    assert found["chosen"] == 10 and found["chosen_by_panel_and_fall"] == 20
    assert list(found["alarms"]) == ["20", "30"] and found["panel_alarms"] == [30]
    assert values["best_of"][0]["best"] == 0.812 and values["best_of"][0]["saved"] == "30%"
    text = (tmp_path / hacking_tables.TABLES).read_text()
    (row,) = [
        line for line in text.splitlines() if line.startswith("| proxy_clips, seed 2 | 30 | 0.9")
    ]
    assert row == (
        "| proxy_clips, seed 2 | 30 | 0.900, 0.300 | 10 | 0.600, 0.700 | 10 | 0.600, 0.700 | 20 | 0.300 |"
    )


def test_a_finished_job_is_one_with_these_commands(tmp_path, monkeypatch):
    """The log has the output of its last attempt."""
    monkeypatch.setattr(hacking, "POLL", 0.01)
    options = types.SimpleNamespace(jobs=1, limit=60)

    def job(*texts):
        return hacking.Job("a", tmp_path / "a", tuple(("echo", text) for text in texts))

    for texts in (("one", "two"), ("three", "four")):
        assert not job(*texts).finished()
        hacking.run([job(*texts)], lambda: None, options, time.monotonic() + 60)
        assert job(*texts).finished() and not job(texts[0]).finished()
        assert job(*texts).log.read_text().split() == list(texts)
    job().done.write_text("")  # of an earlier version
    assert job("one").finished()


def test_prompts_of_two_texts_name_both_words(tmp_path):
    hacking.write_two_texts(tmp_path)
    for name in hacking.PROMPTS:
        found = load_prompts(tmp_path / f"{name}.jsonl", parse_targets)
        for prompt, targets in zip(found.prompts, found.targets, strict=True):
            assert len(targets) == 2 and '"' + " ".join(targets) + '"' in prompt


def test_distances_of_a_run_are_written_for_every_evaluation(tmp_path, monkeypatch):
    monkeypatch.setattr(hacking_distance, "OCRReward", lambda *_, **__: Reader())
    lines = list(records((0.4, 0.6, 0.8), (0.4, 0.7, 0.5)))
    (tmp_path / run_log.EVALUATIONS).write_text("".join(json.dumps(e) + "\n" for e in lines))
    with pytest.raises(SystemExit, match="previews of 0 evaluations"):
        hacking_distance.main(str(tmp_path))
    for level, evaluation in enumerate(lines):
        path = run_log.preview_path(tmp_path, evaluation["epoch"])
        path.parent.mkdir(exist_ok=True)
        np.savez(path, videos=np.full((2, 1, 16, 64, 3), 3 * level, np.uint8))
    hacking_distance.main(str(tmp_path))
    found = json.loads((tmp_path / hacking_distance.RESULT).read_text())
    assert (found["epoch"], found["reward"], found["outside"]) == (20, 0.8, 6)
    assert [(e["epoch"], e["reward"], e["inside"]) for e in found["earlier"]] == [(10, 0.6, 3)]

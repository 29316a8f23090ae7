"""The race's settings, the figures of a run, and the tables."""

import json
import types

import pytest

from benchmarks import race, race_tables
from grpo.compare import Method
from grpo.records import run_log

FLAGS = types.SimpleNamespace(
    sides=list(race.SIDES),
    seeds=["0", "1"],
    precision=["autocast", "fp32"],
    joined=True,
    limit=60.0,
    epochs=9,
    eval_every=2,
    prompts=64,
    workers=3,
    common=["eval.seed=7"],
)
RUN_LOG = """\
2026-01-01T00:00:00+00:00   function                         compile s  batches     work     peak
2026-01-01T00:00:00+00:00   rollout step                           3.5     0.00     0.03     0.10
2026-01-01T00:00:00+00:00   update                                11.0     0.00     0.35     0.43
2026-01-01T00:00:00+00:00   peak 0.43 GiB in the update, of a device that states no limit
"""


def test_both_sides_get_the_same_settings(tmp_path):
    runs = race.runs(FLAGS)
    assert len(runs) == 2 * (2 * 2 + 3) and {run.seed for run in runs[:7]} == {0}
    found = {}
    for run in runs[:7]:
        arguments = run.command(tmp_path, FLAGS)[3:]
        settings = [a.removeprefix("--config.") for a in arguments if a.startswith("--config.")]
        config = Method(run.name, race.SIDES[run.side][0], tuple(settings)).config()
        found[run.name] = config.to_dict()
        assert ("benchmarks.peer_training" in run.command(tmp_path, FLAGS)) == bool(run.precision)
    for theirs, ours in race_tables.PAIRS[:2]:
        assert found[f"{theirs}-fp32"] == found[f"{theirs}-autocast"] == found[ours]
        assert found[ours]["sample"]["sde_steps"] == int(ours[-1])
    assert found["ours"]["train"]["method"] == "nft" and found["ours"]["eval"]["seed"] == 7


def write(folder, rewards, epoch_seconds):
    """Write the records of a run that is evaluated every second epoch, and compiles for 5 s in the
    first one.
    """
    folder.mkdir(parents=True)
    evaluations, epochs, spent = [], [], 0.0
    for n, reward in enumerate(rewards):
        record = {
            "epoch": 2 * n,
            "reward": reward,
            "low": 0.0,
            "high": 1.0,
            "num": 2,
            "seconds": 3.0,
        }
        lists = {"rewards": [reward], "prompts": ["a"], "texts": [""]}
        evaluations.append(record | lists | {"time": f"2026-01-01T00:{n:02d}:00+00:00"})
    for n in range(1, 2 * len(rewards) - 1):
        spent += epoch_seconds
        stages = {"sample": 1.0, "decode": 0.5, "score_wait": 0.25, "update": 0.25}
        total = epoch_seconds + (5.0 if n == 1 else 0.0)
        record = {"epoch": n, "spent_seconds": spent, "evaluations": 640}
        epochs.append(record | {"seconds": stages | {"total": total}})
    for name, records in ((run_log.EVALUATIONS, evaluations), (run_log.METRICS, epochs)):
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))


def test_the_figures_of_a_run(tmp_path):
    write(tmp_path / "run", (0.5, 0.6, 0.66, 0.7), 2.0)
    (tmp_path / "run" / "run.log").write_text(RUN_LOG)
    began = 1767225600.0 - 10  # ten seconds before the first evaluation ended
    found = race_tables.measure(tmp_path / "run", 0.15, began, "limit")
    assert (found["ended"], found["epoch"], found["seconds"]) == ("reached", 4, 8.0)
    assert found["compile"] == 3.5 + 11 + 5 and found["epoch_seconds"] == 2.0
    assert found["command"] == 10 + 120 - 3 * 3 and found["evaluations"] == 4 * 640
    assert found["curve"][-1] == [6, 12.0, 0.7] and found["stages"]["sample"] == 1.0
    found = race_tables.measure(tmp_path / "run", 0.25, began, "limit")
    assert (found["ended"], found["epoch"], found["seconds"]) == ("limit", 6, 12.0)
    assert not race_tables.finished(race_tables.measure(tmp_path / "run", 0.25, began, "stopped"))


def test_the_tables(tmp_path):
    runs = {}
    for name, rewards, seconds in (
        ("theirs-2-fp32", (0.5, 0.66), 8.0),
        ("ours-same-2", (0.5, 0.7), 2.0),
        ("theirs-9-fp32", (0.5, 0.55), 16.0),
        ("ours", (0.5, 0.5), 1.0),
    ):
        write(tmp_path / name, rewards, seconds)
        found = race_tables.measure(tmp_path / name, 0.15, 1767225600.0, "limit")
        runs[name] = {"0": found}
    runs["ours-same-2"]["1"] = runs["ours-same-2"]["0"] | {"seconds": 5.0}
    runs["ours"]["1"] = runs["ours"]["0"] | {"ended": "stopped"}
    results = {"target": 0.15, "prompts": 64, "every": 2, "workers": 3, "runs": runs}
    lines = race_tables.table(results).splitlines()
    (row,) = [line for line in lines if line.startswith("| ours-same-2 ")]
    assert row == (
        "| ours-same-2 | 0, 1 | 4.0, 5.0 | 4.5 | 9.5 | 54.0 | 2.00 | 1.00, 0.50, 0.25, 0.25 | 2 | "
        "1280 | 0.500 | 0.700 |"
    )
    assert "| theirs-2-fp32 / ours-same-2 | 4.0 | 2.3 | 1.0 | 4.0 |" in lines  # seed 0 alone
    assert "| theirs-2-fp32 / ours | < 8.0 | < 3.0 | < 1.0 | 8.0 |" in lines
    assert "| theirs-9-fp32 / ours | unknown | unknown | unknown | 16.0 |" in lines
    assert "- ours, seed 1: stopped after 2.0 s" in lines
    widths = {line.count(" | ") for line in lines if line.startswith("| theirs-2-fp32 |")}
    assert widths == {len(race_tables.HEAD) - 1}


@pytest.mark.parametrize(
    "theirs, ours, text",
    [
        ((8.0, False), (2.0, False), "4.0"),
        ((8.0, True), (2.0, False), "> 4.0"),
        ((8.0, False), (2.0, True), "< 4.0"),
        ((8.0, True), (2.0, True), "unknown"),
    ],
)
def test_a_ratio_is_a_bound_where_a_side_did_not_reach_the_target(theirs, ours, text):
    assert race_tables.ratio(race_tables.Mean(*theirs), race_tables.Mean(*ours)) == text

"""`python -m grpo.train` as its user runs it: whole runs, runs that are killed at any moment, and
bad input.

They are compared with the run `whole`, in a process of its own: only runs of the same kind are equal
to the bit. Runs whose process is not the subject: `test_train_here.py`.
"""

import contextlib
import datetime
import json
import os
import pathlib
import re
import signal
import subprocess
import time

import numpy as np
import pytest

from convert import to_diffusers
from convert.export_lora import export
from grpo.records import run_log
from tests import commands
from tests.grpo.here import train_tiny
from tests.grpo.tiny_run import (
    MEASURES,
    PICTURE,
    assert_same,
    newest,
    result,
    write_recipe,
)
from wan_jax.command_line.cli import UserError

UNREAD = "reward.weights.ocr=None"  # where scores do not matter: no engine is loaded


def launch(config, *overrides, command=commands.command, **kwargs):
    """`overrides`: 'key=value' of the config; command: or `commands.fresh`."""
    settings = (f"--config.{o}" for o in (*MEASURES, *PICTURE, *overrides))
    return subprocess.Popen(
        command("grpo.train", f"--config={config}", *settings),
        env=commands.environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **kwargs,
    )


def train(config, *overrides, **kwargs):
    """(exit code, standard output, standard error) of a whole run."""
    process = launch(config, *overrides, **kwargs)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def kill_when(config, event, *overrides):
    """Starts a run and SIGKILLs it as soon as `event(output so far)`; returns the output."""
    process, out = launch(config, *overrides), ""
    os.set_blocking(process.stdout.fileno(), False)
    try:
        deadline = time.time() + 240
        while not event(out):
            assert time.time() < deadline and process.poll() is None, out + process.stderr.read()
            with contextlib.suppress(BlockingIOError):
                out += os.read(process.stdout.fileno(), 65536).decode()
            time.sleep(0.001)
    finally:
        os.kill(commands.process_id(process), signal.SIGKILL)  # itself, so that it is over at once
        process.communicate()
    return out


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """A run that nothing disturbed: (its folder, its output)."""
    root = tmp_path_factory.mktemp("whole")
    config, run = write_recipe(model, root)
    code, out, err = train(config)
    assert code == 0, out + err
    return config, run, out


@pytest.mark.slow
def test_evaluation_of_a_checkpoint_repeats_the_runs_own(whole, tmp_path):
    """`python -m grpo.evaluate`: the base as epoch 0 saw it, the checkpoint as the last evaluation
    did.
    """
    config, run, _ = whole
    env = commands.environment()
    command = commands.command(
        "grpo.evaluate",
        f"--config={config}",
        f"--checkpoint={run}",
        *(f"--config.{o}" for o in PICTURE),
    )
    done = subprocess.run(
        [*command, f"--out={tmp_path / 'out'}"], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0 and "report.html" in done.stdout, done.stdout + done.stderr
    ours, theirs = (run_log.read_evaluations(folder) for folder in (tmp_path / "out", run))
    assert [r["epoch"] for r in ours] == [0, 3] and (tmp_path / "out" / "report.html").is_file()
    assert len(list((tmp_path / "out" / "side_by_side").iterdir())) == 2
    for record in ours:
        same = next(r for r in theirs if r["epoch"] == record["epoch"])
        assert record["prompts"] == same["prompts"] and record["texts"] == same["texts"]
        np.testing.assert_allclose(record["rewards"], same["rewards"], atol=1e-6)
    refused = subprocess.run([*command, f"--out={run}"], capture_output=True, text=True, env=env)
    assert refused.returncode == 1 and "is a training run's folder" in refused.stderr


def test_whole_run(whole):
    _, run, out = whole
    assert re.search(r"epoch 0: held-out OCR reward \d\.\d+ \[", out)
    assert "memory of a device" in out and "compiled again" not in out
    assert re.search(
        r"about \d+ (s|min) or less, by the first evaluation", out.split("epoch 1/3")[0]
    )
    assert "epoch 3/3: reward" in out and "report.html" in out.splitlines()[-1]
    last, arrays, (metrics, evaluations) = result(run)
    assert last == 3
    assert [r["epoch"] for r in metrics] == [1, 2, 3]
    assert [r["epoch"] for r in evaluations] == [0, 2, 3]
    for record in metrics:
        assert record["ratio_max_error"] <= 1e-5
        assert record["grad_norm"] > 0
    adapters = {k: v for k, v in arrays.items() if k.startswith("trained") and "lora_b" in k}
    assert adapters and all(np.abs(v).max() > 0 for v in adapters.values())
    lines = (run / "run.log").read_text().splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == out.splitlines()
    assert all(datetime.datetime.fromisoformat(line.split(" ", 1)[0]).tzinfo for line in lines)
    assert lines[0].endswith("at once") and "Ctrl-C once" in lines[0]
    assert all(len(line) <= 100 for line in out.splitlines() if line.startswith("epoch"))
    assert "ETA" in out
    (entry,) = run_log.read_starts(run)
    assert entry["epoch"] == 0 and entry["in_force"]["train.kl_weight"] == 0.004
    saved = json.loads((run / "config.json").read_text())
    assert saved["lora"]["rank"] == 4 and saved["command"].startswith("python -m grpo.train")
    html = (run / "report.html").read_text()
    assert "tide" in html and "data:image/png;base64," in html
    assert not re.search(r'(src|href)="(?!data:|#)', html)


@pytest.mark.slow
def test_same_command_again_changes_nothing(whole, capsys):
    config, run, _ = whole
    before = result(run)
    train_tiny(config)
    assert "report.html" in (out := capsys.readouterr().out) and "epoch 3/3" not in out
    assert_same(result(run), before)


@pytest.mark.slow
def test_killed_again_and_again_continues_bit_for_bit(whole, recipe):
    """Before the first epoch is saved, and in the save of a later one, whose figures are logged
    already; then the run ends as if nothing had been.
    """
    config, run = recipe
    folder = run / "checkpoints"

    def temporary():
        return [p.name for p in folder.iterdir() if "tmp" in p.name]

    kill_when(config, lambda out: "epoch 0: held-out" in out)
    # a checkpoint that is not the first is being written: its temporary folder is there
    for _ in range(5):
        kill_when(config, lambda out: (folder / "1").is_dir() and temporary())
        if temporary():
            break
    assert temporary(), "no kill hit a save"
    assert newest(run) < 3
    code, out, err = train(config, command=commands.fresh)  # with another seed of Python's hashes
    assert code == 0 and "continuing" in out, out + err
    assert_same(result(run), result(whole[1]))
    assert not temporary()


def signalled(config, number, after, *overrides, times=1):
    """(exit code, standard output, standard error) of a run that gets the signal `number` after a
    line's beginning, so many times.
    """
    process = launch(config, *overrides)
    for line in process.stdout:
        if line.startswith(after):
            break
    for _ in range(times):
        process.send_signal(number)
        time.sleep(0.05)  # two signals at once are one
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


@pytest.mark.slow
def test_ctrl_c_twice_stops_with_one_line(recipe):
    config, run = recipe
    code, _, err = signalled(config, signal.SIGINT, "epoch 2/", "epochs=1000", UNREAD, times=2)
    assert code == 130, err
    assert "the same command continues" in err and "Traceback" not in err
    assert newest(run) >= 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "number, code, name", [(signal.SIGTERM, 143, "SIGTERM"), (signal.SIGINT, 130, "Ctrl-C")]
)
def test_a_signal_saves_the_epoch_first(recipe, number, code, name):
    """Of a run that would have saved at its end only; how such runs continue:
    tests/grpo/test_hosts.py.
    """
    config, run = recipe
    settings = "epochs=1000", "save.every=1000", UNREAD
    ended, out, err = signalled(config, number, "epoch 0:", *settings)
    assert ended == code and "report" in out and "Traceback" not in err, out + err
    assert (
        1 <= newest(run) < 1000
        and f"ended by {name} after epoch {newest(run)}, which is saved" in err
    )
    assert f"ended by {name} after" in (run / "run.log").read_text().splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.3, 3.0])
def test_ctrl_c_while_starting(recipe, seconds):
    config, _ = recipe
    process = launch(config, command=commands.fresh)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "stopped" in err and "Traceback" not in err, err


def test_files_can_be_read_by_others(whole, model, tmp_path):
    """All that a run and the commands after it write has the permissions of new files: 0644 by the usual
    umask, which libraries that make temporary files do not ask for.
    """
    _, run, _ = whole
    export(run, model, tmp_path / "lora")
    export(run, model, tmp_path / "peft", "peft")
    to_diffusers.export(model, tmp_path / "diffusers", checkpoint=str(run))
    (tmp_path / "new").touch()
    allowed = (tmp_path / "new").stat().st_mode
    written = [p for root in (run, pathlib.Path(model), tmp_path) for p in root.rglob("*")]
    files = [path for path in written if path.is_file()]
    names = {path.name for path in files}
    assert names >= {"report.html", "README.md", "reward.png", "adapter_config.json", "run.log"}
    assert names >= {"wan_jax.json", "model_index.json", "pytorch_lora_weights.safetensors"}
    assert [str(path) for path in files if path.stat().st_mode & allowed != allowed] == []


def test_other_settings_are_refused(whole):
    config, run, _ = whole
    before = result(run)
    with pytest.raises(UserError, match=r"(?s)train\.adam_b1: 0\.9 -> 0\.5.*--config\.run_dir"):
        train_tiny(config, "train.adam_b1=0.5", "epochs=6")
    assert_same(result(run), before)


def test_bad_prompts_are_named_by_line(recipe):
    config, run = recipe
    prompts = config.parent / "train.txt"
    prompts.write_text('A sign that says "open".\nA sign that says nothing.\n\nAnother one.\n')
    code, _, err = train(config)
    assert code == 1 and "Traceback" not in err
    assert "train.txt: 2 of 4 lines" in err and "line 2: " in err and "line 4: " in err
    assert not run.exists()


@pytest.mark.quick_cases(3)
@pytest.mark.parametrize(
    "override, message",
    [
        ("sample.frames=4", "frames"),
        ("sample.height=50", "50"),
        ("model.path=/nowhere", "convert.from_diffusers"),
        ("prompts.train=/nowhere.txt", "/nowhere.txt does not exist"),
        ("lora.init=/nowhere.safetensors", "/nowhere.safetensors does not exist"),
        ("train.learning_rat=1", "learning_rate"),
        ("sample.groups=100", "100"),
    ],
)
def test_bad_input_is_one_message(recipe, override, message):
    config, run = recipe
    code, _, err = train(config, override)
    assert code == 1 and "Traceback" not in err and message in err, err
    assert len(err.strip().splitlines()) <= 6, err
    assert not run.exists()


def test_run_folder_that_cannot_be_written(recipe):
    config, run = recipe
    run.write_text("a file where the folder should be")
    code, _, err = train(config)
    assert code == 1 and "Traceback" not in err and str(run) in err, err
    assert run.read_text() == "a file where the folder should be"


@pytest.mark.slow
def test_a_run_whose_folder_is_moved_away_while_it_compiles_makes_no_new_one(recipe):
    config, run = recipe
    process = launch(config, UNREAD)
    for line in process.stdout:
        if line.startswith("rematerialisation"):
            run.rename(f"{run}.moved")
            break
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1 and "Traceback" not in err and f"{run} was moved" in err, err
    assert not run.exists()

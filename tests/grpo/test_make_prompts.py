"""`python -m grpo.make_prompts`: files that training reads."""

import subprocess
import sys

import pytest

from grpo.data.prompts import load_prompts
from grpo.make_prompts import write
from rewards.ocr.targets import parse_targets
from wan_jax.errors import UserError


def test_command(tmp_path):
    command = [
        sys.executable,
        "-m",
        "grpo.make_prompts",
        "--count=50",
        "--heldout=20",
        f"--out={tmp_path / 'p'}",
    ]
    done = subprocess.run([*command, "--characters=4,9"], capture_output=True, text=True)
    assert done.returncode == 0 and "50 prompts" in done.stdout, done.stderr
    train, heldout = (
        load_prompts(tmp_path / "p" / name, parse_targets)
        for name in ("train.jsonl", "heldout.txt")
    )
    assert (
        len(train) == 50
        and len(heldout) == 20
        and set(train.metadata[0]) == {"text", "surface", "scene", "light", "camera"}
    )
    assert train.prompts == load_prompts(tmp_path / "p" / "train.txt", parse_targets).prompts
    done = subprocess.run([*command, "--characters=4,x"], capture_output=True, text=True)
    assert (
        done.returncode == 1
        and "--characters=4,x" in done.stderr
        and "Traceback" not in done.stderr
    )


def test_a_file_that_is_not_read_back_is_an_error(tmp_path):
    line = {"prompt": 'A "B"', "targets": ["B"]}
    write(tmp_path / "good", [line])
    assert load_prompts(tmp_path / "good.jsonl", parse_targets).targets == (("B",),)
    for bad in ([line, line], [line | {"targets": ["C"]}]):
        with pytest.raises(UserError, match=r"bad\.txt"):
            write(tmp_path / "bad", bad)

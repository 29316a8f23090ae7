"""`python -m grpo.report`."""

import subprocess

import pytest

from tests import commands
from tests.grpo.report.pages import report_of_run


@pytest.mark.slow
def test_command(tmp_path):
    report_of_run(tmp_path)
    (tmp_path / "report.html").unlink()
    env = commands.environment()
    command = commands.command("grpo.report", "--run", tmp_path)
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0 and "0.46 -> 0.61" in done.stdout, done.stderr
    assert (tmp_path / "report.html").exists()
    command = commands.command("grpo.report", "--run", tmp_path / "missing")
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 1 and str(tmp_path / "missing") in done.stderr
    assert "Traceback" not in done.stderr

"""Console scripts are the commands that `python -m` runs."""

import importlib.util
import re
import subprocess
import sys
import tomllib

import pytest

from tests import commands
from wan_jax.command_line.scripts import COMMANDS


def test_every_command_has_its_script():
    scripts = tomllib.loads((commands.ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == dict.fromkeys(COMMANDS, "wan_jax.command_line.scripts:main")
    table = (commands.ROOT / "docs/reference/command_line.md").read_text()
    assert re.findall(r"^\| `(wan-\S+)` \| `python -m (\S+)`", table, re.MULTILINE) == [
        *COMMANDS.items()
    ]
    for module in COMMANDS.values():
        assert importlib.util.find_spec(module), module


@pytest.mark.parametrize("name", ["wan-settings", "wan-settings.exe"])
def test_a_script_runs_its_command(tmp_path, name):
    path = tmp_path / name
    path.write_text("from wan_jax.command_line.scripts import main\nmain()\n")
    script = [sys.executable, path, "train.learning_rate"]
    module = [sys.executable, "-m", "grpo.settings", "train.learning_rate"]
    out, expected = (
        subprocess.run(
            command, env=commands.environment(), capture_output=True, text=True, check=True
        )
        for command in (script, module)
    )
    assert out.stdout == expected.stdout != ""

"""Importing the packages changes nothing of the program that does it."""

import json
import os
import subprocess
import sys

from tests import commands

MODULES = (
    "wan_jax.command_line.cli",
    "wan_jax.inference.pipeline",
    "grpo.train",
    "grpo.compare",
    "grpo.plan",
    "rewards.remote.client",
    "rewards.pool",
    "convert.from_diffusers",
)
PROGRAM = f"""
import gc, importlib, json, logging, os, signal
import absl.app, absl.logging, cv2, flax.nnx, jax, ml_collections.config_flags, optax, orbax.checkpoint, tqdm

def state():
    loggers = {{name: logging.getLogger(name).level for name in list(logging.root.manager.loggerDict)}}
    return {{"signals": {{s.name: repr(signal.getsignal(s)) for s in signal.Signals}},
            "environment": dict(os.environ), "gc": {{"threshold": gc.get_threshold(), "frozen": gc.get_freeze_count()}},
            "levels": {{"": logging.root.level}} | {{name: level for name, level in loggers.items() if level}},
            "jax": {{key: repr(value) for key, value in jax.config.values.items()}}}}

before = state()
for name in {MODULES}:
    importlib.import_module(name)
changed = {{part: {{key: value for key, value in values.items() if before[part].get(key) != value}}
           for part, values in state().items()}}
print(json.dumps([before["signals"]["SIGINT"], changed]))
"""


def test_importing_changes_nothing(tmp_path):
    """In a program that is run by `python -m`, and whose own package imports this one before
    anything else.
    """
    package = tmp_path / "program"
    package.mkdir()
    (package / "__init__.py").write_text("import wan_jax\n")
    (package / "main.py").write_text(PROGRAM)
    env = commands.environment()
    env["PYTHONPATH"] = os.pathsep.join([str(tmp_path), env["PYTHONPATH"]])
    done = subprocess.run(
        [sys.executable, "-m", "program.main"], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    interrupt, changed = json.loads(done.stdout)
    assert "default_int_handler" in interrupt and not any(changed.values()), changed

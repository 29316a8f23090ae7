"""Commands as users run them, in processes of their own."""

import os
import pathlib
import re

DEVICES = re.compile(r"--xla_force_host_platform_device_count=\d+")


def environment(*without: str, devices: int = 0, **changes: str) -> dict[str, str]:
    """This process's, without PyTorch, which the tests alone need; compiling is as quick as here (`tests/conftest.py`).

    without: names of other variables that are left out; devices: simulated ones, 0: the CPU as it is; changes: values
    of other variables.
    """
    hidden = str(pathlib.Path(__file__).parent / "without_torch")
    kept = {k: v for k, v in os.environ.items() if k not in without}
    quick = DEVICES.sub(f"--xla_force_host_platform_device_count={devices}" if devices else "", kept["XLA_FLAGS"])
    path = os.pathsep.join(filter(None, (hidden, os.environ.get("PYTHONPATH"))))
    return kept | {"XLA_FLAGS": quick, "PYTHONPATH": path} | changes

"""Commands as users run them, in processes of their own."""

import os
import pathlib


def environment(*without: str, **changes: str) -> dict[str, str]:
    """This process's, with one device, no setting of XLA's, and no PyTorch, which the tests alone need.

    without: names of other variables that are left out; changes: values of others.
    """
    hidden = str(pathlib.Path(__file__).parent / "without_torch")
    kept = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", *without)}
    return kept | {"PYTHONPATH": os.pathsep.join(filter(None, (hidden, os.environ.get("PYTHONPATH"))))} | changes

"""On PYTHONPATH, hides PyTorch from a Python that has it."""

import sys

sys.modules["torch"] = None

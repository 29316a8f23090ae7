"""A package that cannot be imported: the message says whether it is missing, broken, or short of
memory.
"""

import pytest

from rewards.packages import import_problem


@pytest.mark.parametrize(
    "error, said",
    [
        (ModuleNotFoundError("No module named 'rapidocr'"), "is missing (No module"),
        (ImportError("/x/state.so: failed to map segment from shared object"), "not enough memory"),
        (
            ImportError("libx.so: cannot create shared object descriptor: Cannot allocate memory"),
            "not enough memory",
        ),
        (
            ImportError("libgomp.so.1: cannot allocate memory in static TLS block"),
            "cannot be loaded (libgomp",
        ),
        (ImportError("libGL.so.1: cannot open shared object file"), "cannot be loaded (libGL"),
    ],
)
def test_import_problem(error, said):
    text = import_problem("OCR engine 'x'", error, "pip install x")
    assert text.startswith("OCR engine 'x' ") and said in text and str(error) in text
    assert ("pip install x" in text) != ("ulimit -v" in text)

"""Everything here is marked `rocm`, and lowered at the precision that training uses. `compiled`
collects the table.
"""

import jax
import pytest

TABLE = pytest.StashKey[list[str]]()


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent.name == "rocm":
            item.add_marker("rocm")


def pytest_configure(config):
    config.stash[TABLE] = []


@pytest.fixture(autouse=True)
def training_precision():
    with jax.default_matmul_precision("default"):
        yield


@pytest.fixture(scope="session")
def table(request) -> list[str]:
    """Rows that the session prints at its end."""
    return request.config.stash[TABLE]


def pytest_terminal_summary(terminalreporter, config):
    if config.stash[TABLE]:
        terminalreporter.section("compiled for gfx942")
        terminalreporter.line(
            "| program | compile s | arguments GB | temporary GB | peak GB | collectives |"
        )
        terminalreporter.line("|---|---|---|---|---|---|")
        for row in config.stash[TABLE]:
            terminalreporter.line(row)

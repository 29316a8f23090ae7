"""The data of the tests of `grpo.learning.data_loss`."""

import numpy as np
import pytest

from grpo.learning.data_loss import DataSource
from tests.grpo.data_folders import write_data
from tests.grpo.tiny_policy import SHAPE
from wan_jax.inference.pipeline import TextTable


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(data, latents, embeddings) of five items, each with its own prompt."""
    return write_data(tmp_path_factory.mktemp("data") / "data", SHAPE, height=32, width=32)


@pytest.fixture(scope="module")
def source(written):
    """A source of the data, without an embedding of the empty prompt."""
    table = TextTable((), np.zeros((1, 12), np.float32), 6)
    return DataSource.make(written[0], table, np.float32)

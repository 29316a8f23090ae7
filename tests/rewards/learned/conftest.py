"""Checkpoints of tiny models, written once."""

import pytest


@pytest.fixture(scope="session")
def videoalign_files(tmp_path_factory):
    """(folder of the checkpoint, folder of the base, its weights merged)."""
    from tests.rewards.learned.tiny_models import videoalign

    folder = tmp_path_factory.mktemp("videoalign")
    return folder, *videoalign(folder)


@pytest.fixture(scope="session")
def hpsv3_files(tmp_path_factory):
    """(folder of the checkpoint, folder of the base, its weights)."""
    from tests.rewards.learned.tiny_models import hpsv3

    folder = tmp_path_factory.mktemp("hpsv3")
    return folder, *hpsv3(folder)

"""A learned reward behind the command of the reward server, as docs/howto/own_rewards.md gives it."""

import json

import numpy as np
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("torch", reason="needs pip install -e '.[learned]'")

from rewards.base import PromptRecord
from rewards.remote.client import RemoteReward
from tests.rewards.serving import TOKEN, Command

VIDEO = np.random.default_rng(0).integers(0, 256, (5, 30, 50, 3), np.uint8)


@pytest.mark.slow
def test_a_server_of_videoalign(videoalign_files):
    from rewards.learned.videoalign import VideoAlign

    folder, base, _ = videoalign_files
    command = ["--reward=rewards.learned.videoalign:VideoAlign", "--name=va", "--workers=1"]
    options = {"path": str(folder), "base": str(base), "device": "cpu"}
    record = PromptRecord((), "a red sign")
    with Command(*command, f"--options={json.dumps(options)}") as server:
        client = RemoteReward([server.url()], expect={"name": "va"}, token=TOKEN, patience=5.0)
        score = client.score(VIDEO, record)
        client.close()
    assert dict(score.parts) == VideoAlign(**options).score(VIDEO, record)
    with Command(*command, f"--options={json.dumps(options | {'path': '/no/such'})}") as server:
        assert server.process.wait(60) == 1
        error = server.process.stderr.read().strip().splitlines()[-1]
    assert error.startswith("error: the reward cannot be built: VideoAlign") and "/no/such" in error

"""The attacks on the server that need no waiting, on a server in this process."""

import logging
import urllib.parse

import pytest

pytest.importorskip("fastapi")

from benchmarks import attack_inputs, server_attacks
from rewards.quality import QualityReward
from tests.rewards.serving import serving


def test_the_server_refuses_what_is_malformed(caplog):
    with serving(
        lambda: QualityReward("exposure"), token=attack_inputs.TOKEN, upload_timeout=0.2
    ) as url:
        parts = urllib.parse.urlsplit(url)
        address = parts.hostname, parts.port
        tallies = [
            *server_attacks.attack_with_requests(address, mutations=100, seed=0),
            server_attacks.attack_by_leaving(address),
        ]
    assert [wrong for tally in tallies for wrong in tally.wrong] == [] and sum(
        tally.tried for tally in tallies
    ) > 300
    assert not any(record.exc_info or record.levelno >= logging.ERROR for record in caplog.records)

"""The attacks that take no time, on a server in this process and on its client."""

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


def test_the_client_takes_no_bad_answer_for_a_score(monkeypatch):
    # tests/rewards/remote/test_wire.py
    skipped = [f"{name}={value!r:.30}" for name, value in attack_inputs.BAD_FIELDS]
    answers = [
        answer
        for answer in attack_inputs.bad_answers()
        if not answer[2] and answer[0] not in skipped
    ]
    monkeypatch.setattr(server_attacks, "bad_answers", lambda: answers)
    assert server_attacks.attack_client_with_answers().wrong == [] and len(answers) > 40


def test_the_client_starts_with_good_servers_only():
    assert server_attacks.attack_client_at_the_start().wrong == []

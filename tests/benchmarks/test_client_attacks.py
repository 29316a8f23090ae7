"""The attacks on the client that need no waiting."""

import pytest

from benchmarks import attack_inputs, client_attacks


@pytest.mark.slow
def test_the_client_takes_no_bad_answer_for_a_score(monkeypatch):
    # tests/rewards/remote/test_wire.py has the malformed fields.
    fields = [f"{name}={value!r:.30}" for name, value in attack_inputs.BAD_FIELDS]
    answers = [
        (name, start, repeated)
        for name, start, repeated in attack_inputs.bad_answers()
        if not repeated and name not in fields
    ]
    monkeypatch.setattr(client_attacks, "bad_answers", lambda: answers)
    assert client_attacks.attack_client_with_answers().wrong == [] and len(answers) > 40


def test_the_client_starts_with_good_servers_only():
    assert client_attacks.attack_client_at_the_start().wrong == []

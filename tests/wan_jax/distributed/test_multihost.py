"""What processes compare with each other; the test plays the other processes."""

import pytest

from wan_jax.distributed import multihost
from wan_jax.errors import UserError


@pytest.fixture
def second(monkeypatch):
    """This process is number 1 of two; returns a function that sets what number 0 sends to
    `gather`.
    """
    monkeypatch.setattr(multihost, "FOLDER_SECONDS", 0.5)
    monkeypatch.setattr(multihost.socket, "gethostname", lambda: "node1")
    return lambda sent: monkeypatch.setattr(multihost, "gather", lambda mine: [sent, mine])


@pytest.mark.slow
def test_a_folder_that_is_not_shared(second, monkeypatch):
    monkeypatch.setattr(multihost, "from_first", lambda read: "token")
    second(("node0", "/runs/a", True))
    late = iter([None, "old", "token"])
    # a network file system shows it later
    multihost.check_same_folder("config.run_dir", "/runs/a", lambda: next(late))
    for content in (None, "old"):
        with pytest.raises(
            UserError, match=r"config\.run_dir=/runs/a of process 1 on node1 .*\(/runs/a on node0"
        ):
            multihost.check_same_folder(
                "config.run_dir", "/runs/a", lambda content=content: content
            )


def test_facts_that_differ_are_named_with_both_values(second):
    facts = {
        "config.seed": "0",
        "config.train.learning_rate": "0.01",
        "prompts.train": "4 prompts (SHA-256 ab)",
    }
    second(("node0", facts))
    multihost.check_same_facts(dict(facts))
    with pytest.raises(
        UserError,
        match=r"process 1 on node1 differs .* config\.train\.learning_rate: 0\.02 instead of "
        r"0\.01; prompts\.train: 5 prompts instead of 4 prompts \(SHA-256 ab\); start",
    ):
        multihost.check_same_facts(
            facts | {"config.train.learning_rate": "0.02", "prompts.train": "5 prompts"}
        )
    with pytest.raises(UserError, match=r"config\.seed: None instead of 0"):
        multihost.check_same_facts({k: v for k, v in facts.items() if k != "config.seed"})

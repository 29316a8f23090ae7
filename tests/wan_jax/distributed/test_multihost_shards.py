"""What processes compare with each other, with the other processes played by the test."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from wan_jax.command_line.cli import UserError
from wan_jax.distributed import multihost


@pytest.fixture
def second(monkeypatch):
    """This process is number 1 of two; returns a function that sets what number 0 sends to
    `gather`.
    """
    monkeypatch.setattr(multihost, "FOLDER_SECONDS", 0.5)
    monkeypatch.setattr(multihost.socket, "gethostname", lambda: "node1")
    return lambda sent: monkeypatch.setattr(multihost, "gather", lambda mine: [sent, mine])


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


def placed(spec, wrong: int | None = None) -> jax.Array:
    """float32 [8, 4] on a mesh of two replicas of four shards; device number `wrong` holds another
    value in it.
    """
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    sharding, value = NamedSharding(mesh, spec), np.arange(32, dtype=np.float32).reshape(8, 4)
    parts = [
        jax.device_put(value[index] + (device.id == wrong), device)
        for device, index in sharding.devices_indices_map(value.shape).items()
    ]
    return jax.make_array_from_single_device_arrays(value.shape, sharding, parts)


def check(tree, monkeypatch):
    """`check_same` as if devices 0 to 3 were process 0's and 4 to 7 process 1's."""
    digests = multihost.replica_digests(tree)
    seen = [
        {
            devices: {d: digest for d, digest in held.items() if devices and d // 4 == process}
            for devices, held in digests.items()
        }
        for process in (0, 1)
    ]
    monkeypatch.setattr(multihost, "gather", lambda mine: seen)
    multihost.check_same(tree, "the weights")


@pytest.mark.parametrize(
    "spec, wrong, message",
    [
        (P(), 5, "process 1 differ from those of process 0 .1 of 2"),
        (P("fsdp"), 6, "process 1 differ from those of"),
        (P(None, "fsdp"), 7, "process 1 differ"),
        (P("fsdp"), 1, "process 1 differ from those of process 0"),
        (P("data"), 2, "process 0 differ from each other"),
        (P(), 3, "process 0 differ from each other"),
    ],
)
def test_weights_that_differ_between_two_holders_of_a_shard(spec, wrong, message, monkeypatch):
    tree = {"a": placed(P()), "b": placed(spec)}
    check(tree, monkeypatch)
    with pytest.raises(UserError, match="the weights of " + message):
        check(tree | {"b": placed(spec, wrong)}, monkeypatch)


def test_shards_that_one_device_holds_are_not_compared(monkeypatch):
    spec = P("data", "fsdp")
    check({"a": placed(spec, 3)}, monkeypatch)
    assert list(multihost.replica_digests({"a": placed(spec)})) == [()]

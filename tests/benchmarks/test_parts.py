"""The parts of an epoch at a tiny size on both sides, DiffusionNFT's loss in PyTorch, and the sums."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import comparison_works, epoch_cost, parts, workload
from benchmarks.workload import Record, Stage
from grpo.learning.policy import COMPILER_OPTIONS
from grpo.methods.nft import NFT

SETTINGS = types.SimpleNamespace(
    size="tiny",
    height=16,
    width=32,
    frames=1,
    batch=2,
    guidance=4.5,
    kl=0.004,
    repeats=1,
    dtype="float32",
    remat="none",
    guided_remat="block",
    weights="dtype",
    devices=1,
    fsdp=1,
    task="parts",
    mode="autocast",
    attention=None,
    compiler="aot_eager",
)


@pytest.fixture
def peer():
    for name in ("peft", "diffusers"):
        pytest.importorskip(name)
    import torch

    from benchmarks import peer

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small that several threads only wait for each other
    yield peer
    torch.set_num_threads(threads)


def check(record, videos=2):
    """videos: of a device."""
    assert tuple(record.stages) == comparison_works.PARTS
    assert all(stage.ms > 0 for stage in record.stages.values())
    assert max(abs(ratio - 1) for ratio in record.ratio) < 1e-4
    work = workload.batch_flops(workload.transformer_config("tiny"), (1, 2, 4, 16), videos, 1.0)
    for name, passes in (("guided rollout", 2), ("grpo update", 6), ("nft update", 3)):
        stage = record.stages[name]
        assert stage.tflops == pytest.approx(passes * work / stage.ms / 1e9)


@pytest.mark.slow
def test_our_parts(monkeypatch):
    monkeypatch.setitem(COMPILER_OPTIONS, "xla_backend_optimization_level", 0)
    check(parts.measure(SETTINGS))


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [1, 2])
def test_our_parts_on_two_devices(monkeypatch, fsdp):
    monkeypatch.setitem(COMPILER_OPTIONS, "xla_backend_optimization_level", 0)
    settings = vars(SETTINGS) | {"devices": 2, "fsdp": fsdp, "batch": 4}
    check(parts.measure(types.SimpleNamespace(**settings)))


@pytest.mark.slow
@pytest.mark.parity
def test_the_peers_parts(peer):
    check(peer.measure(SETTINGS))


@pytest.mark.slow
@pytest.mark.parity
def test_the_behaviour_policy_is_a_copy_that_stays(peer):
    import torch

    config = workload.transformer_config("tiny")
    policy = peer.make_policy(
        types.SimpleNamespace(**vars(SETTINGS) | {"mode": "fp32"}), config, "cpu", 4
    )
    policy.guidance = 1.0
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    text, x = peer.random_text(config, 2, "cpu"), torch.randn(2, 16, 1, 2, 4)

    def velocities():
        found = {}
        for adapter in ("default", "old"):
            policy.model.set_adapter(adapter)
            with torch.no_grad():
                found[adapter] = policy.velocity(x, 1, text)
        policy.model.set_adapter("default")
        return found

    policy.keep_behaviour()
    before = velocities()
    torch.testing.assert_close(before["old"], before["default"])
    policy.update_nft([(x, 1, text, torch.tensor([0.9, 0.1]))])
    after = velocities()
    torch.testing.assert_close(after["old"], before["old"], rtol=0, atol=0)
    assert float((after["default"] - before["default"]).abs().max()) > 1e-5


@pytest.mark.parity
def test_nft_of_the_peer():
    pytest.importorskip("peft")
    pytest.importorskip("diffusers")
    import torch

    from benchmarks.peer_policy import nft_loss
    from grpo.learning.flow_matching import Rows

    rng, shape = np.random.default_rng(0), (2, 1, 2, 4, 16)
    x0, noise, v, behaviour, reference = rng.standard_normal((5, *shape)).astype(np.float32)
    s, weight = np.float32(0.6), np.array([0.8, 0.3], np.float32)
    x = (1 - s) * x0 + s * noise
    arrays = [torch.from_numpy(a) for a in (x, x0)]
    velocities = [torch.from_numpy(a) for a in (v, behaviour, reference, weight)]
    theirs = nft_loss(*arrays, float(s), *velocities, kl=0.01)
    rows = Rows(
        x=jnp.asarray(x),
        x0=jnp.asarray(x0),
        sigma=jnp.full(2, s),
        v=jnp.asarray(v),
        v_lagged={"old": jnp.asarray(behaviour)},
        v_reference=jnp.asarray(reference),
        error=jnp.zeros(2),
        target=jnp.asarray(noise - x0),
        weight=jnp.asarray(weight),
    )
    with jax.disable_jit():
        loss = float(NFT(kl_weight=0.01).loss(rows)[0].mean())
    loss += 0.01 * float(((v - reference) ** 2).mean())
    assert loss == pytest.approx(float(theirs), rel=1e-5)  # fp32 sums of 256 values


def record(rollout, guided, grpo, nft, decode):
    values = dict(zip(comparison_works.PARTS, (rollout, guided, grpo, nft, decode)))
    return vars(Record("side", {}, "GPU", "1.0")) | {
        "stages": {name: vars(Stage(ms)) for name, ms in values.items()}
    }


def test_the_seconds_of_a_video():
    results = {
        "1.3b-parts": {
            "ours": record(10.0, 20.0, 100.0, 40.0, 7.0),
            "ours-fp8": record(5.0, 10.0, 100.0, 40.0, 7.0),
            "autocast": record(20.0, 60.0, 400.0, 120.0, 70.0),
            "bf16-compile": {"failed": "out of memory"},
        },
        "small-parts": {"ours": record(1.0, 2.0, 10.0, 4.0, 1.0)},
        "1.3b-image": {},
    }
    lines = epoch_cost.table(results).splitlines()
    assert lines[2] == (
        "| 1.3B, 9 x 1 x 512 x 512 | Flow-GRPO | ours | (20 x 20.0 + 7.0 + 19 x 100.0) / 9 | "
        "0.256 | 0.986 |  | 3.84 |  |"
    )
    (fast,) = [line for line in lines if "| Flow-GRPO-Fast | ours-fp8 |" in line]
    assert "(20 x 10.0 + 7.0 + 2 x 100.0) / 9 | 0.045 |" in fast
    (unguided,) = [
        line for line in lines if "| NFT without guidance | ours |" in line and "9 x" in line
    ]
    assert "(20 x 10.0 + 7.0 + 4 x 40.0) / 9 | 0.041 |" in unguided
    assert "(10 x 2.0 + 1.0 + 9 x 10.0) / 32" in lines[10]
    assert {line.count(" | ") for line in lines[2:]} == {len(epoch_cost.HEAD) - 1}
    assert epoch_cost.table({"1.3b-image": {}}) == ""

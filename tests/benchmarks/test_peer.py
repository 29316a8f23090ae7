"""Both sides of the comparison at a tiny size on the CPU: that they run, and that they compute the
same.
"""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks import decode, epoch, full_size, scaling, workload
from grpo.learning.policy import COMPILER_OPTIONS
from grpo.learning.policy_loss import LossConfig, Rows, policy_gradient_terms
from rewards.ocr.rules import OCRReward
from rewards.pool import RewardPool
from wan_jax.diffusion import sde
from wan_jax.diffusion.guidance import TextBatch, velocity
from wan_jax.diffusion.schedule import flow_sigmas
from wan_jax.models import flat_params
from wan_jax.storage import key_table, model_dir

pytestmark = pytest.mark.slow
TINY = dict(
    size="tiny",
    height=16,
    width=32,
    frames=1,
    batch=2,
    guidance=1.0,
    kl=0.0,
    repeats=1,
    dtype="float32",
    remat="block",
    weights="dtype",
    kernel=True,
    micro=1,
    profile=False,
    chunk=None,
    groups=1,
    group_size=2,
    steps=2,
    updates=1,
    readers=1,
    trained=1,
    mode="autocast",
    attention=None,
    compiler="aot_eager",
    devices=1,
    fsdp=1,
    context=1,
    full=False,
    offload_optimiser=False,
    experts=1,
    text_rows=workload.TEXT,
)


def settings(**changes):
    return types.SimpleNamespace(**TINY | changes)


@pytest.fixture
def quick(monkeypatch):
    """Compiles our rollout and update without LLVM's optimisation."""
    monkeypatch.setitem(COMPILER_OPTIONS, "xla_backend_optimization_level", 0)


@pytest.fixture
def peer():
    pytest.importorskip("peft")
    pytest.importorskip("diffusers")
    import torch

    from benchmarks import peer

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small that several threads only wait for each other
    yield peer
    torch.set_num_threads(threads)


def check(record, stages):
    assert set(record.stages) == set(stages) and all(
        stage.ms > 0 for stage in record.stages.values()
    )
    if record.ratio:
        assert max(abs(r - 1) for r in record.ratio) < 1e-4


def test_our_steps(quick):
    record = full_size.measure(settings())
    check(record, ("rollout", "update"))
    work = workload.batch_flops(workload.transformer_config("tiny"), (1, 2, 4, 16), 2, 1.0)
    update = record.stages["update"]
    assert update.tflops == pytest.approx(3 * work / update.ms / 1e9)


@pytest.mark.parametrize(
    "changes",
    [
        {"devices": 2, "context": 2, "batch": 1},
        {"devices": 2, "fsdp": 2, "full": True, "offload_optimiser": True, "experts": 2},
    ],
    ids=lambda c: "-".join(c),
)
def test_our_steps_on_every_axis(quick, changes, capsys):
    record = full_size.measure(settings(**changes))
    check(record, scaling.STAGES)
    output = capsys.readouterr().out
    assert ("all trained" if "full" in changes else "adapters trained") in output
    fsdp, context = (changes.get(name, 1) for name in ("fsdp", "context"))
    assert f"mesh data {2 // fsdp // context} x fsdp {fsdp}" in output
    assert output.count("on the host after") == (2 if "offload_optimiser" in changes else 0)


def test_our_epoch(quick):
    f = settings(steps=workload.STEPS, trained=2)  # the programs are those of the test above
    with RewardPool(lambda: OCRReward(rule="flow_grpo_video")) as pool:
        one = epoch.Epoch(f, pool)
        assert list(one(0)) == ["sample", "decode", "score wait", "update"]
    assert max(abs(ratio - 1) for ratio in one.ratio) < 1e-4


def test_our_decoding():
    check(decode.measure(settings()), ("decode",))


@pytest.mark.parity
@pytest.mark.parametrize("mode", ["autocast", "bf16"])
def test_the_peers_steps(peer, mode):
    check(
        peer.measure(settings(task="steps", mode=mode, guidance=4.5, kl=0.004)),
        ("rollout", "update"),
    )


@pytest.mark.parity
def test_the_peers_epoch(peer):
    check(
        peer.measure(settings(task="epoch", kl=0.004)),
        ("epoch", "sample", "decode", "score wait", "update"),
    )


@pytest.mark.parity
def test_the_peers_decoding(peer):
    check(peer.measure(settings(task="decode", mode="bf16")), ("decode",))


@pytest.mark.parity
def test_the_peer_computes_what_ours_does(peer):
    """The velocity with guidance at the same weights, and the loss at the same velocities, in fp32."""
    import torch

    torch.manual_seed(0)
    i, schedule, config = (
        3,
        flow_sigmas(workload.STEPS, workload.SHIFT),
        workload.transformer_config("tiny"),
    )
    transformer = peer.make_transformer(config, torch.float32, "cpu")
    weights = {k: v.numpy() for k, v in transformer.state_dict().items()}
    graph, like = model_dir.abstract("transformer", config, attention="xla")
    flat = key_table.to_ours(
        "transformer", weights, {k: v.shape for k, v in flat_params.flatten(like).items()}
    )
    state = flat_params.unflatten(like, {k: jnp.asarray(v) for k, v in flat.items()})
    policy = peer.Policy(transformer, "fp32", schedule, guidance=4.5)
    text, x = peer.random_text(config, 2, "cpu"), torch.randn(2, 16, 1, 2, 4)
    kept = policy.sample(x, i, text)

    def ours(tensor):  # [B, C, F, H, W] -> [B, F, H, W, C]
        return jnp.asarray(tensor.numpy().transpose(0, 2, 3, 4, 1))

    rows = TextBatch(
        jnp.asarray(text.embeddings[:, : workload.TEXT].numpy()),
        jnp.asarray(text.negative[0, : workload.TEXT].numpy()),
        workload.TEXT_ROWS - workload.TEXT,
    )
    run = jax.jit(
        lambda s, x: velocity(nnx.merge(graph, s), x, float(schedule.timesteps[i]), rows, 4.5),
        compiler_options={"xla_backend_optimization_level": 0},
    )
    ours_v = run(state, ours(x))
    with torch.no_grad():
        theirs_v = policy.velocity(x, i, text)
    assert np.linalg.norm(ours_v - ours(theirs_v)) < 1e-5 * np.linalg.norm(ours_v)

    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    advantages = torch.tensor([1.0, -0.5])
    with torch.no_grad():
        moved = policy.velocity(x, i, text)
        loss, ratios = policy.loss(kept, text, advantages, kl=0.004)
    g = sde.diffusion_coefficient(sde.SDEConfig("flow_grpo_wan"), schedule)[i]
    columns = [jnp.full(2, value) for value in (schedule.sigmas[i], schedule.sigmas[i + 1], g)]
    ours_rows = Rows(
        ours(kept.x),
        ours(kept.x_next),
        jnp.asarray(kept.log_prob.numpy()),
        jnp.asarray(advantages.numpy()),
        *columns,
        mask=jnp.ones(2, bool),
    )
    terms = jax.jit(functools.partial(policy_gradient_terms, config=LossConfig(kl_beta=0.004)))
    ours_loss, metrics = terms(ours_rows, ours(moved), ours(theirs_v))
    assert float(ours_loss.mean()) == pytest.approx(float(loss), rel=1e-5)
    averages = metrics.averages()
    assert averages["kl"] > 1e-6 and averages["ratio_max"] == pytest.approx(
        float(ratios.max()), abs=1e-6
    )

"""Programs compiled ahead: the loop runs these very ones, they tell what a device must hold, and
what cannot fit is refused before a weight is read.
"""

import collections
import dataclasses
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import wan21_1_3b_ocr, wan21_14b_ocr, wan22_a14b_ocr, wan22_ti2v_5b_ocr
from grpo import setup, train
from grpo.compiled import compile, costs, functions
from grpo.compiled.functions import Functions
from grpo.learning.optimiser import init_state
from grpo.learning.policy import make_policy
from grpo.learning.policy_gradient import stack_batches
from grpo.methods import grpo
from grpo.records import run_log
from tests.grpo.compiled_names import compiled_names
from tests.grpo.specs import devices_mesh, functions_of, spec_of, tiny_spec
from wan_jax.command_line.cli import UserError
from wan_jax.distributed import sharding as sharding_lib
from wan_jax.models.config import TransformerConfig
from wan_jax.storage import model_dir

WIDE = TransformerConfig(
    num_attention_heads=4,
    attention_head_dim=64,
    text_dim=24,
    freq_dim=32,
    ffn_dim=512,
    num_layers=2,
)  # its matrices are large enough to be split by fsdp
GIB = 2**30
A14B = {"sample.steps": 4, "sample.sde_range": (0, 4), "train.timesteps": 2}


@pytest.mark.slow
def test_the_loop_runs_what_was_compiled_ahead(start, capsys, monkeypatch):
    """In bfloat16, on two devices that share the weights."""
    spec, *rest = start(
        2, **{"model.dtype": "bfloat16", "mesh.fsdp": 2, "train.updates_per_epoch": 1}
    )
    # with functions of its own: what it compiles is counted
    monkeypatch.setattr(setup, "Functions", Functions)
    seen = compiled_names()
    train.train(spec, *rest)
    programs = Functions(spec).programs()
    ours = collections.Counter(f"jit({program.jitted.__name__})" for program in programs)
    assert ours == {"jit(rollout_step)": 1, "jit(update)": 1, "jit(ode_step)": 1, "jit(decode)": 1}
    assert {name: seen.count(name) for name in ours} == ours  # once each, by `ahead`
    out = capsys.readouterr().out
    assert "memory of a device, GiB: frozen weights" in out and "epoch 2/2" in out
    assert "compiled again" not in out
    assert out.index("memory of a device") < out.index("trained parameters")


@pytest.mark.slow
def test_groups_sampled_in_excess_are_not_trained(start, capsys, monkeypatch):
    """Four groups of four, in batches of two, of which two with one best and one worst video each
    are trained, by what each of their steps brought.
    """
    stacked = []
    monkeypatch.setattr(grpo, "stack_batches", lambda *a: stacked.append(a) or stack_batches(*a))
    spec, *rest = start(
        1,
        **{
            "sample.groups": 4,
            "sample.batch_size": 2,
            "train.groups": 2,
            "train.best_of": 1,
            "train.credit": "otca",
            "eval.every": 2,
            "eval.guidance": 3.0,
            "eval.also_unguided": True,
        },
    )
    train.train(spec, *rest)
    out = capsys.readouterr().out
    assert "compiled again" not in out and "; without guidance: OCR reward" in out
    for record in run_log.read_evaluations(spec.recipe.run_dir):
        assert len(record["unguided"]["rewards"]) == record["num"] == 4
        assert record["unguided"]["rewards"] != record["rewards"]
    assert [record["videos_trained"] for record in run_log.read_metrics(spec.recipe.run_dir)] == [
        4,
        4,
    ]
    assert len(stacked) == 4  # two optimiser steps in each of two epochs, one group in each
    for trajectories, advantages, valid, _ in stacked:
        assert len(trajectories) == 2 and valid.sum() == 2
        # of each step; 1 of it in the mean is the video's
        assert advantages.shape == (2, len(trajectories[0].x), 2)
        of_video = advantages.mean(1)
        assert valid.ravel()[of_video.argmax()] and valid.ravel()[of_video.argmin()]
        assert np.abs(advantages - of_video[:, None]).max() > 1e-3


@pytest.mark.slow
def test_one_step_a_group_trains_both_experts_by_the_programs_compiled_ahead(start, capsys):
    """Three groups of four in batches of six, on two devices."""
    spec, *rest = start(
        2,
        experts=2,
        **{
            "sample.steps": 4,
            "sample.sde_range": (0, 4),
            "sample.sde_window": "one_per_group",
            "sample.sde_steps": 1,
            "sample.groups": 3,
            "sample.batch_size": 6,
            "sample.shared_noise": True,
            "train.updates_per_epoch": 1,
            "train.credit": "rectified",
            "sample.ode_solver": "dpmpp_2m",
            "train.kl_as": "reward",
            "eval.every": 2,
        },
    )
    seen = compiled_names()
    train.train(spec, *rest)
    assert [seen.count(f"jit({name})") for name in ("rollout_step", "update", "choose_rows")] == [
        1,
        2,
        1,
    ]
    assert "compiled again" not in capsys.readouterr().out
    for record in run_log.read_metrics(spec.recipe.run_dir):
        for name in ("transformer", "transformer_2"):
            expert = record["experts"][name]
            assert expert["grad_norm"] > 0 and expert["ratio_max_error"] < 1e-5, record
            # of the sampling policy, at first the base
            assert (expert["kl"] > 1e-10) == (record["epoch"] > 1)
            assert (
                record.keys() > expert.keys()
                and record["kl_min"] <= expert["kl"] <= record["kl_max"]
            )


def test_all_weights_without_a_reference_need_no_frozen_ones():
    run = functions_of(wan21_1_3b_ocr, "wan2.1-1.3b", **{"lora.rank": 0})
    assert run.frozen is not None and run.rollout_step().args[1] is run.frozen
    alone = functions_of(wan21_1_3b_ocr, "wan2.1-1.3b", **{"lora.rank": 0, "train.kl_weight": 0.0})
    assert alone.update().args[1] is None
    assert compile.resident_bytes(alone, False)["frozen weights"] == 0


def test_what_compiles_again_is_named():
    counter = compile.CompileCounter()

    @jax.jit
    def wandering(x):
        return x + 1

    wandering(jnp.zeros(3))
    assert any("wandering" in name for name in counter.names)
    counter.clear()
    wandering(jnp.ones(3))
    assert counter.warning(2) is None
    wandering(jnp.zeros(4))
    assert "epoch 3 compiled again" in counter.warning(3) and "wandering" in counter.warning(3)


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("rank", [4, 0], ids=["lora", "full"])
def test_what_stays_is_what_lies_on_a_device(rank):
    spec = spec_of(wan21_1_3b_ocr, "wan2.1-1.3b", devices=8, fsdp=4, **{"lora.rank": rank})
    mesh, settings = spec.mesh, spec.settings
    preset = dataclasses.replace(spec.preset, transformer=WIDE)
    run = Functions(dataclasses.replace(spec, preset=preset))
    stays = compile.resident_bytes(run, offload=False)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), run.policy.base)
    frozen = sharding_lib.shard_params(zeros, mesh)
    _, trainable = make_policy(
        WIDE,
        frozen,
        mesh,
        lora=settings.lora,
        key=jax.random.key(0),
        dtype=jnp.bfloat16,
        attention="chunked",
        remat="block",
    )
    state = init_state(trainable, settings.optimiser, spec.method.adaptive_kl, spec.method.lagged)

    def there(tree):
        return sum(
            shard.data.nbytes
            for x in jax.tree.leaves(tree)
            for shard in x.addressable_shards
            if shard.device == jax.devices()[0]
        )

    assert (
        stays["frozen weights"]
        == there(frozen)
        < sum(x.nbytes for x in jax.tree.leaves(frozen)) / 2
    )
    assert stays["trained weights, optimiser, average"] == there(state)


def test_two_experts():
    """They share a program where guidance and shapes agree."""
    run = functions_of(wan22_a14b_ocr, "wan2.2-a14b", devices=4)
    names = [p.name for p in run.programs()]
    assert names == [
        f"{what}, {expert}"
        for what in ("rollout step", "update", "evaluation step")
        for expert in ("transformer", "transformer_2")
    ] + ["decode"]
    updates = [p for p in run.programs() if p.name.startswith("update")]
    k = [p.args[2].log_prob.shape[1] for p in updates]
    assert k == [run.spec.trained_steps(0), run.spec.trained_steps(1)] and k[0] > k[1]
    assert sum(k) == run.spec.recipe.sample.sde_steps
    same = {"sample.guidance_2": None, "eval.guidance_2": None}
    alike = functions_of(wan22_a14b_ocr, "wan2.2-a14b", devices=4, **same)
    assert [p.name for p in alike.programs()] == [
        "rollout step",
        *names[2:4],
        "evaluation step",
        "decode",
    ]
    one, both = (
        compile.resident_bytes(run, offload)["frozen weights"] for offload in (True, False)
    )
    assert both == 2 * one == 2 * compile.device_bytes(run.params(run.policy.base))
    assert compile.offloads(run, 80 * GIB)
    assert not compile.offloads(run, 139 * GIB) and not compile.offloads(run, None)


@pytest.mark.slow
def test_ti2v_5b_and_clips_in_chunks():
    size = {
        "sample.frames": 81,
        "sample.height": 704,
        "sample.width": 1280,
        "sample.batch_size": 4,
    }
    run = functions_of(wan22_ti2v_5b_ocr, "wan2.2-ti2v-5b", devices=4, **size)
    assert run.spec.shape == (21, 44, 80, 48)
    first, chunk = run.decode()
    assert [p.name for p in (first, chunk)] == ["decode, first chunk", "decode, chunk"]
    assert first.args[2] == () and len(jax.tree.leaves(chunk.args[2])) > 10
    text = run.text()
    assert text.embeddings.dtype == text.negative.dtype == jnp.bfloat16
    assert [p.name for p in run.programs()] == [
        "rollout step",
        "update",
        "evaluation step",
        first.name,
        chunk.name,
    ]


REMEDIES = [
    ({}, 1, 1, "sample.batch_size=8", "mesh.fsdp=1 up"),
    ({"model.remat": "none"}, 1, 1, "remat=block, or", "fsdp=1"),
    ({"model.remat": "offload"}, 1, 1, "batch_size=8", "remat="),
    ({}, 8, 2, "mesh.fsdp=2 up to the 8", "batch_size=8, which"),
    ({"lora.rank": 0}, 8, 8, "lora.rank=32.", "fsdp=8 up"),
    ({"lora.rank": 0}, 8, 8, "moments_dtype=bfloat16.", "fsdp=8 up"),
    ({"lora.rank": 0, "train.moments_dtype": "bfloat16"}, 8, 8, "lora.rank=32.", "moments_dtype"),
    ({}, 8, 8, "model.remat=", "moments_dtype"),
    ({"lora.rank": 0}, 8, 8, "train.ema_decay=0.", "fsdp=8 up"),
    ({"lora.rank": 0, "train.ema_decay": 0.0}, 8, 8, "lora.rank=32.", "ema_decay"),
    ({"lora.rank": 0, "train.offload_optimiser": True}, 8, 8, "lora.rank=32.", "moments_dtype"),
    ({"lora.rank": 0}, 8, 8, "lora.rank=32.", "model.weights"),
    ({}, 8, 8, "model.weights=fp8, or nf4.", "moments_dtype"),
    ({"model.weights": "fp8"}, 8, 8, "model.weights=nf4.", "fp8"),
    ({"model.weights": "nf4"}, 8, 8, "model.remat=", "model.weights"),
]


@pytest.mark.parametrize("overrides, devices, fsdp, said, unsaid", REMEDIES)
def test_what_cannot_fit_is_refused_with_the_settings_that_help(
    overrides, devices, fsdp, said, unsaid
):
    run = spec_of(wan21_1_3b_ocr, "wan2.1-1.3b", devices=devices, fsdp=fsdp, **overrides)
    programs = (
        compile.Measured("rollout step", 1.0, GIB, 0),
        compile.Measured("update", 1.0, 5 * GIB, 2 * GIB),
    )
    memory = compile.Memory({"frozen weights": 3 * GIB, "VAE": GIB}, programs)
    for limit in (None, 11 * GIB):
        compile.check_fits(memory, run, False, limit)
    with pytest.raises(UserError) as error:
        compile.check_fits(memory, run, False, 11 * GIB - 1)
    message = str(error.value)
    assert (
        "needs 11.0 GiB" in message
        and "in the update" in message
        and "frozen weights 3.0" in message
    )
    assert said in message and unsaid not in message


def test_refused_before_a_weight_is_read(start, monkeypatch):
    spec, *rest = start(1)
    spec = dataclasses.replace(spec, memory=2**20)
    monkeypatch.setattr(
        compile, "measure", lambda program: compile.Measured(program.name, 0.0, 2**21, 0)
    )
    monkeypatch.setattr(model_dir, "build", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(
        UserError, match=r"on each device, in the rollout step .* --config\.sample\.batch_size=4"
    ):
        train.train(spec, *rest)


def test_data_counts_shards_and_repeats():
    sharded = jax.ShapeDtypeStruct(
        (8, 4), jnp.float32, sharding=sharding_lib.batch_sharding(devices_mesh(8))
    )
    whole = jax.ShapeDtypeStruct((8, 4), jnp.bfloat16)
    program = types.SimpleNamespace(
        args=("stays", sharded, whole), resident=1, extra=(whole, [whole])
    )
    assert compile.data_bytes(program) == 16 + 64 + 2 * 64


def test_what_the_host_holds_is_counted_and_refused_where_it_cannot():
    """14B with its optimiser on the host: 12 bytes a parameter, which devices share."""
    for devices, fsdp in ((1, 1), (8, 8)):
        settings = {"lora.rank": 0, "train.kl_weight": 0.0, "train.offload_optimiser": True}
        run = functions_of(wan21_14b_ocr, "wan2.1-14b", devices=devices, fsdp=fsdp, **settings)
        waits = compile.pinned_bytes(run, offload=False)
        count = sum(math.prod(x.shape) for x in run.trainable.values())
        assert waits == {"optimiser, average": pytest.approx(12 * count / fsdp, rel=0.01)}
    needed = compile.Memory({}, (compile.Measured("update", 1.0, GIB, 0),), waits)
    assert needed.table(None)[-1].startswith(
        "pinned memory of the host for each device, GiB: optimiser, average 19.96"
    )
    for limit in (None, 25 * GIB):
        compile.check_fits(needed, run.spec, False, None, limit)
    with pytest.raises(
        UserError,
        match=r"20\.0 GiB for each device in pinned.*10\.0 GiB.*fsdp=8.*=False.*=bfloat16\. .*ema_decay=0\.$",
    ):
        compile.check_fits(needed, run.spec, False, None, 10 * GIB)
    both = functions_of(wan22_a14b_ocr, "wan2.2-a14b")
    assert compile.pinned_bytes(both, True) == {
        "both experts": 2 * compile.device_bytes(both.frozen)
    }
    assert compile.pinned_bytes(both, False) == {}


@pytest.mark.slow
def test_what_is_planned():
    """The programs' batches, the old weights in memory, the reference where one is asked, the
    FLOPs.
    """

    def of(module, model, **values):
        return functions_of(module, model, backend="xla", **values)

    run = of(wan22_a14b_ocr, "wan2.2-a14b", **{"train.method": "nft", "train.timesteps": 5})
    spec, batch = run.spec, run.update_batch(1)
    m = spec.settings.batches // spec.recipe.train.updates_per_epoch
    b = spec.recipe.sample.batch_size
    assert batch.x0.shape == (m, b, *spec.shape) and batch.worse is None
    assert batch.sigma.shape == (m, spec.trained_steps(1), b)
    assert spec.trained_steps(0) + spec.trained_steps(1) == 5
    assert run.state.lagged["old"].keys() == run.state.trainable.keys()
    assert run.updates[0] is run.updates[1]
    assert run.trajectories == (run.latents(),) * spec.settings.batches
    full = {"train.method": "dpo", "lora.rank": 0, "train.kl_weight": 0.0}
    pairs = of(wan21_1_3b_ocr, "wan2.1-1.3b", **full)
    assert pairs.frozen is not None and pairs.update_batch(0).worse is not None
    assert not pairs.state.lagged
    online = of(wan21_1_3b_ocr, "wan2.1-1.3b", **full, **{"train.reference_every": 9})
    assert online.frozen is None and online.state.lagged
    settings = {"train.kl_weight": 0.004, "sample.sde_steps": 4}
    grpo, rwr = (
        costs.work(of(wan21_1_3b_ocr, "wan2.1-1.3b", **settings, **{"train.method": method}))
        for method in ("grpo", "rwr")
    )
    assert rwr.sample == grpo.sample and rwr.update == pytest.approx(grpo.update / 2)  # no guidance


def test_each_expert_has_its_guidance_and_all_the_schedule(monkeypatch):
    """In rollout, update, probes and evaluation; and the teacher its own."""
    made = types.SimpleNamespace(
        make_ode_step=lambda module, solver, guidance: guidance,
        decoder_functions=None,
    )
    monkeypatch.setattr(functions, "pipeline", made)
    monkeypatch.setattr(functions, "make_step", lambda policy, table, guidance, **kwargs: guidance)
    monkeypatch.setattr(functions, "make_probe", lambda policy, guidance: guidance)
    values = {"sample.guidance": 2.0, "sample.guidance_2": 3.0}
    values |= {"eval.guidance": 4.0, "eval.guidance_2": 5.0, "train.kl_weight": 0.0}

    def run(**more):
        return Functions(tiny_spec("wan2.2-a14b", **A14B | values | more))

    own = run(**{"train.credit": "longcat", "sample.ode_solver": "dpmpp_2m"})
    assert own.steps == (2, 3) and own.eval_steps == (4, 5)
    assert [guidance for guidance, _ in own.spec.method.gradient_keys(own.spec)] == [2, 3]
    assert own.table.weight is not None and own.table.dpm is not None
    for guided, wanted in ((True, (2, 3)), (False, (1, 1))):
        nft = run(**{"train.method": "nft", "train.guided": guided, "reward.confidence": 0.1})
        assert nft.spec.method.gradient_keys(nft.spec) == nft.probes == wanted
    teacher = {"train.cfg_distill_weight": 1.0, "train.cfg_distill_guidance": 6.0}
    taught = run(**teacher, **{"train.cfg_distill_guidance_2": 7.0, "sample.guidance": 1.0})
    keys = taught.spec.method.gradient_keys(taught.spec)
    assert [(guidance, loss.distill_guidance) for guidance, loss in keys] == [(1, 6), (1, 7)]

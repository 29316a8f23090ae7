"""`python -m grpo.plan`: its numbers against formulas and measurements, its search, its command
without weights.
"""

import dataclasses
import re
import shutil
import subprocess

import jax
import pytest

from configs import wan21_1_3b_ocr, wan21_14b_ocr, wan22_a14b_ocr, wan22_ti2v_5b_ocr
from grpo import plan
from grpo.compiled import compile, costs, device_kinds, largest_videos, targets
from grpo.compiled.functions import Functions
from tests import commands
from tests.grpo.specs import functions_of, spec_of
from tests.grpo.tiny_run import write_recipe
from wan_jax.command_line.cli import UserError
from wan_jax.models import flops, presets
from wan_jax.models.config import TransformerConfig

GIB = 2**30
PICTURES = {
    f"sample.{key}": value
    for key, value in {
        "frames": 1,
        "height": 512,
        "width": 512,
        "groups": 2,
        "group_size": 9,
        "batch_size": 9,
        "sde_steps": 4,
    }.items()
}


@pytest.mark.parametrize("frames, height, width", [(1, 512, 512), (33, 240, 416)])
def test_a_step_is_the_transformer_twice_for_guidance(frames, height, width):
    size = {"sample.frames": frames, "sample.height": height, "sample.width": width}
    run = functions_of(
        wan21_1_3b_ocr, "wan2.1-1.3b", backend="xla", **size, **{"sample.batch_size": 4}
    )
    d, ffn, layers, s, text = 1536, 8960, 30, run.spec.tokens, run.text_rows + 1
    block = s * (6 * 2 * d * d + 4 * d * ffn) + 4 * s * s * d + text * 4 * d * d + 4 * s * text * d
    program = run.rollout_step()
    found = flops.count(program.jitted, *program.args)
    # and the embeddings, the adapters, the last layer
    assert 1 < found / (2 * 4 * layers * block) < 1.03


FEW = {"sample.groups": 2, "sample.group_size": 2, "sample.batch_size": 2, "sample.sde_steps": 1}


# docs/results.md, "Every model at full size": the rows "resume", in which little compiles
MEASURED = [
    (wan21_1_3b_ocr, "wan2.1-1.3b", 5.5, 5.0),
    (wan21_14b_ocr, "wan2.1-14b", 32.8, 25.1),
    (wan22_a14b_ocr, "wan2.2-a14b", 34.1, 27.2),
    (wan22_ti2v_5b_ocr, "wan2.2-ti2v-5b", 4.4, 3.7),
]


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("module, model, sample, update", MEASURED, ids=[m[1] for m in MEASURED])
def test_seconds_are_near_what_was_measured(module, model, sample, update):
    run = functions_of(module, model, **PICTURES, **{"train.updates_per_epoch": 1})
    kind = device_kinds.KINDS["h200"]
    found = costs.seconds(run, kind, costs.default_efficiency(run.spec, kind))
    assert found["sample"] == pytest.approx(sample, rel=0.25)
    assert found["update"] == pytest.approx(update, rel=0.3)
    assert 0.03 < found["decode"] < 0.3


def test_seconds_of_an_fp8_base_are_near_the_measured_parts():
    """docs/results.md, the parts of an epoch of 14B: 528.3 ms a rollout step of nine pictures and 2214.6
    ms an update of one, on an H200. An A100 has no products in 8 bits.
    """
    fp8 = {"train.updates_per_epoch": 1, "model.remat": "block", "model.weights": "fp8"}
    run = functions_of(wan21_14b_ocr, "wan2.1-14b", **PICTURES, **fp8)
    kind = device_kinds.KINDS["h200"]
    found = costs.seconds(run, kind, costs.default_efficiency(run.spec, kind))
    assert found["sample"] == pytest.approx(2 * 20 * 0.5283, rel=0.1)
    assert found["update"] == pytest.approx(2 * 4 * 2.2146, rel=0.1)
    bf16 = run.spec.changed(model={"weights": "dtype"})
    for name, equal in (("a100-80", True), ("h100", False)):
        kind = device_kinds.KINDS[name]
        of = [costs.default_efficiency(spec, kind).rollout for spec in (run.spec, bf16)]
        assert (of[0] == of[1]) == equal


def test_fp8_weights_are_not_planned_with_a_16_bit_copy():
    """XLA for the CPU would keep one of all of them: 2.4 GiB here."""
    size = {"sample.height": 64, "sample.width": 64, "sample.frames": 1, "sample.batch_size": 1}
    size |= {"sample.groups": 1, "model.remat": "block"}
    work = {}
    for weights in ("dtype", "fp8"):
        run = functions_of(wan21_1_3b_ocr, "wan2.1-1.3b", **size, **{"model.weights": weights})
        planned = targets.for_the_cpu(run)
        work[weights] = compile.measure(planned.update(0)).work
        stored = [compile.device_bytes(each.policy.base) for each in (run, planned)]
        if weights == "fp8":
            assert stored[0] == pytest.approx(stored[1], rel=0.1)
    assert work["fp8"] == pytest.approx(work["dtype"], rel=0.5)


@pytest.mark.parametrize(
    "device, work, said",
    [("24GiB", 9, ""), ("24GiB", 20, "may not fit: "), ("24GiB", 40, "does not fit: ")],
)
def test_an_estimate_too_high_by_less_than_its_error_may_fit(monkeypatch, device, work, said):
    monkeypatch.setenv(targets.FRACTION, "1")
    run, target = spec_of(wan21_1_3b_ocr, "wan2.1-1.3b"), targets.choose_target(device, 0)
    programs = (compile.Measured("update", 1.0, work * GIB, 0),)
    needed = compile.Memory({"frozen weights": 10 * GIB}, programs)
    found = targets.verdict(needed, run, False, target)
    assert found.startswith(said) and bool(found) == bool(said)
    here = dataclasses.replace(target, kind=None)  # compiled by the device's own compiler
    assert targets.verdict(needed, run, False, here).startswith("does not fit" if said else "")
    assert not said or f"needs {10 + work:.1f} GiB" in found


def test_what_seconds_depend_on():
    kind, efficiency = device_kinds.KINDS["mi300x"], costs.Efficiency(0.5, 0.25, 1.0, "")

    def seconds(devices=1, **values):
        found = spec_of(wan21_1_3b_ocr, "wan2.1-1.3b", devices=devices, **PICTURES | values)
        return costs.seconds(Functions(found), kind, efficiency)

    base, without = seconds(), seconds(**{"train.kl_weight": 0.0})
    assert without == base | {"update": pytest.approx(base["update"] * 3 / 4)}
    # batches of nine
    more = seconds(**{"eval.num_prompts": 2 * 64})["evaluation"]
    assert more == pytest.approx(base["evaluation"] * 15 / 8)
    assert seconds(devices=3)["sample"] == pytest.approx(base["sample"] / 3)
    spec = spec_of(wan21_1_3b_ocr, "wan2.1-1.3b")
    assert "assumed to hold on MI300X" in costs.default_efficiency(spec, kind).source


def test_every_size_has_its_seconds():
    """Twice the tokens take nearly twice as long (the text does not grow); the schedule is between."""
    size = {"sample.frames": 1, "sample.height": 64, "sample.width": 128, "eval.height": 64}
    size |= {"eval.width": 128, "eval.shift": 3.0, "eval.more_sizes": ((64, 256, 1),)}
    size |= {"eval.num_prompts": 2, "eval.every": 1000}
    functions = functions_of(
        wan21_1_3b_ocr, "wan2.1-1.3b", **size, **{"sample.size_schedule": ((51, 64, 256, 4.0),)}
    )
    kind, efficiency = device_kinds.KINDS["h200"], costs.Efficiency(1e-3, 1e-3, 1e-3, "")
    run = functions.spec
    small, large = (
        costs.seconds(functions.of_sizes(each, run.evaluated_sizes[1]), kind, efficiency)
        for each in run.trained_sizes
    )
    assert 1.7 < large["update"] / small["update"] < 2.1
    evaluation, schedule = plan.more_lines(functions, kind, efficiency)
    assert evaluation.startswith("an evaluation, 1 x 64 x 256: ")
    assert f" {small['evaluation']:.1f} s" in evaluation
    hours = float(schedule.rpartition(": ")[2].removesuffix(" h"))
    first, last = (
        run.recipe.epochs * sum(of[name] for name in ("sample", "decode", "update")) / 3600
        for of in (small, large)
    )
    assert first < hours < last


def test_lines_between_compiled_points():
    points = [
        largest_videos.Point(100, 40),
        largest_videos.Point(10, 4),
        largest_videos.Point(200, 240),
    ]
    found = [
        largest_videos.interpolated_work(points, tokens)
        for tokens in (5, 10, 55, 100, 150, 200, 300)
    ]
    assert found == [2, 4, 22, 40, 140, 240, 440]


def test_largest_clips():
    run = functions_of(wan21_1_3b_ocr, "wan2.1-1.3b", **FEW)
    points = [largest_videos.Point(1000, GIB), largest_videos.Point(80000, 80 * GIB)]
    small, middle, large = (
        dict(
            line.strip().split(": ")
            for line in largest_videos.largest_videos(run, GIB, limit, points)
        )
        for limit in (2 * GIB, 17 * GIB, 1000 * GIB)
    )
    assert list(middle) == [f"{h} x {w}" for h, w in largest_videos.SIZES]
    assert set(large.values()) == {"81 frames"} and middle["240 x 416"] == "81 frames"
    assert re.fullmatch(r"1 frame \(9 would need \d+ GiB in the decoder\)", middle["704 x 1280"])
    assert re.fullmatch(r"none \(1 would need \d+ GiB in the \w+\)", small["704 x 1280"])
    ti2v = functions_of(wan22_ti2v_5b_ocr, "wan2.2-ti2v-5b")
    assert [
        line.split(":")[0].strip()
        for line in largest_videos.largest_videos(ti2v, GIB, 1000 * GIB, points)
    ] == ["512 x 512", "480 x 832", "704 x 1280"]  # 240 is no multiple of 32


def test_search_compiles_the_update_at_other_sizes(monkeypatch):
    run = functions_of(wan21_1_3b_ocr, "wan2.1-1.3b", **FEW | {"sample.sde_steps": 10})
    compiled = []
    monkeypatch.setattr(
        compile,
        "measure",
        lambda program, options: (
            compiled.append(program) or compile.Measured(program.name, 0.0, 5, 0)
        ),
    )
    target = targets.Target(device_kinds.KINDS["h200"], jax.devices()[:1], "cpu", GIB, "")
    points = largest_videos.search_points(run, target)
    assert [p.tokens for p in points] == [9 * 30 * 52, 21 * 44 * 80]
    assert all(
        p.args[0].trainable and p.args[1]["proj_out"]["kernel"].get_value().dtype == "float32"
        for p in compiled
    )
    recipe = run.spec.recipe
    assert recipe.sample.frames == 33 and recipe.model.dtype == "bfloat16"  # as they were


def test_models_and_devices_are_chosen():
    recipe = wan21_14b_ocr.get_config()
    assert plan.choose_model(recipe, None)[0] == presets.PRESETS["wan2.1-14b"]
    assert plan.choose_model(recipe, "wan2.2-a14b")[0] == presets.PRESETS["wan2.2-a14b"]
    for module, model, *_ in MEASURED:
        assert plan.choose_model(module.get_config(), None)[0] == presets.PRESETS[model]
    recipe.model.single_expert = True
    alone = plan.choose_model(recipe, "wan2.2-a14b")[0]
    assert alone.experts == ("transformer",) and alone.transformer == TransformerConfig()
    recipe.model.path = "models/mine"
    with pytest.raises(
        UserError, match=r"models/mine does not exist.*--model, one of wan2\.1-1\.3b"
    ):
        plan.choose_model(recipe, None)
    with pytest.raises(UserError, match="--devices=99: this machine has 8"):
        targets.choose_target("here", 99)
    with pytest.raises(UserError, match="--devices=99: XLA_FLAGS allows 8"):
        targets.choose_target("h200", 99)
    target = targets.choose_target("h100", 2)
    assert target.stand_in and len(target.devices) == 2 and target.limit == int(0.75 * 79 * GIB)
    backend, notes = targets.compiled_backend("auto", target, "bfloat16", 128)
    assert backend == "chunked" and "cudnn cannot be compiled here" in notes[0]
    assert targets.compiled_backend("auto", targets.choose_target("here", 1), "float32", 128) == (
        "chunked",
        (),
    )


def test_a_device_may_be_a_memory_alone(monkeypatch):
    monkeypatch.delenv(targets.FRACTION, raising=False)
    target = targets.choose_target("24GiB", 0)
    assert target.limit == int(0.75 * 24 * GIB) and target.stand_in and not target.kind.bf16
    assert any("24 GiB" in note and "assumed" in note for note in target.notes)
    noted = {
        name: any("not measured" in note for note in targets.choose_target(name, 0).notes)
        for name in ("h200", "h100", "rtx4090")
    }
    assert noted == {"h200": False, "h100": True, "rtx4090": True}
    for wrong in ("h300", "24", "0GiB", "-1GiB", "24GB"):
        with pytest.raises(UserError, match=f"--device={wrong} .*mi325x.*24GiB"):
            targets.choose_target(wrong, 0)


@pytest.mark.slow
def test_command_line_without_weights(model, tmp_path):
    without = shutil.ignore_patterns("params", "text_cache")
    shutil.copytree(model, tmp_path / "model", ignore=without)
    config, run = write_recipe(tmp_path / "model", tmp_path)
    env = commands.environment(targets.FRACTION)
    command = commands.command(
        "grpo.plan", f"--config={config}", "--device=h200", "--nosearch", "--update_efficiency=0.1"
    )
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    out = result.stdout
    assert "on 1 x H200: 4 videos of 1 x 16 x 32 a batch (2 tokens each)" in out
    assert "prompts of 32 tokens" in out  # by the tokenizer
    assert "an estimate from the functions in float32" in out and "limit: 0.75 of 139 GiB" in out
    for name in ("rollout step", "update", "evaluation step", "decode"):
        assert re.search(rf"^  {name} +[\d.]+ +[\d.]+ +[\d.]+ +[\d.]+$", out, re.MULTILINE), out
    assert (
        re.search(r"peak \d+\.\d\d GiB in the \w+, of 104\.25 GiB", out)
        and "before that the text encoder" in out
    )
    assert re.search(
        r"an epoch [\d.]+ \(sample [\d.]+, decode [\d.]+, update [\d.]+\), 8 videos", out
    )
    assert "an evaluation" in out and "update by the flags, the others measured on an H200" in out
    assert not run.exists()
    result = subprocess.run([*command, "--devices=3"], env=env, capture_output=True, text=True)
    assert result.returncode == 1 and "batch_size=4 does not divide over 3 devices" in result.stderr
    assert "Traceback" not in result.stderr

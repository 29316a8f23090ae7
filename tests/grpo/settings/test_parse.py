"""A recipe is checked before any work, and turned into the objects that the parts of a run take."""

import re

import pytest

from configs import tiny_ocr
from grpo.compare import Method
from grpo.settings import parse
from grpo.settings.schema import Recipe, make_recipe, values_of
from rewards.choices import PANEL
from wan_jax.command_line.cli import UserError


def test_a_checked_recipe_is_typed_and_normalised(small, put, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    small.run_dir, small.lora.init, small.train.kl_weight = "~/run", "None", 1
    put(small, "reward.servers", [""])
    before = small.to_dict()
    recipe = parse.recipe_from_config(small)
    assert isinstance(recipe, Recipe) and small.to_dict() == before
    assert recipe.run_dir == str(tmp_path / "run") and recipe.lora.init == ""
    assert recipe.reward.servers == () and repr(recipe.train.kl_weight) == "1.0"


def test_the_config_gets_the_form_of_the_recipe(small, put, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    small.run_dir, small.lora.init = "~/run", "None"
    put(small, "reward.servers", [""])
    recipe, settings = parse.recipe_from_config(small), parse.from_config(small)
    assert small.to_dict() == recipe.to_dict() and values_of(small) == values_of(recipe)
    assert settings == parse.settings_of(recipe)


def test_settings_of_flow_grpo(small):
    small.train.groups, small.sample.batch_size, small.train.updates_per_epoch = 1, 2, 2
    small.train.kl_as, small.train.kl_weight = "reward", 0.5
    small.reward.weights.motion, small.lora.rank = 0.0, 0
    found = parse.settings_of(parse.recipe_from_config(small))
    assert (found.videos, found.batches, found.train_batches) == (8, 4, 2)
    assert found.method.name == "grpo" and found.method.levels is None and found.lora is None
    assert found.method.kl_in_reward == 0.5 and found.method.policy_loss.kl_beta == 0.0
    assert found.method.ratio_bound == 2e-3 and not found.method.importance
    assert found.weights == dict.fromkeys(sorted({*PANEL, "ocr"}), 0.0) | {"ocr": 1.0}


@pytest.mark.parametrize(("method", "kl_weight"), [("nft", 1e-4), ("dpo", 0.0), ("rwr", 0.0)])
def test_settings_of_a_method_on_finished_videos(method, kl_weight):
    c = tiny_ocr.get_config()
    c.train.method = method
    found = parse.from_config(c)
    assert found.method.name == method and found.method.kl_weight == kl_weight
    assert found.method.levels == 4 and found.batches == found.train_batches == 2


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("run_dir", "", "run_dir is empty"),
        ("model.path", "", "model.path is empty"),
        ("model.dtype", "float16", "float32, bfloat16"),
        ("sample.group_size", 1, "group_size=1"),
        ("sample.group_size", 1001, "group_size=1001 must be at least 2 and at most 1000"),
        ("sample.steps", 1001, "sample.steps=1001 must be at least 1 and at most 1000; Wan is"),
        ("eval.steps", 100_000, "eval.steps=100000 must be at least 1 and at most 1000"),
        ("mesh.fsdp", -1, "mesh.fsdp=-1 must be at least 0"),
        ("mesh.context", -1, "mesh.context=-1 must be at least 0"),
        ("sample.groups", 0, "groups=0"),
        ("sample.batch_size", 3, "batch_size=3; choose a divisor of 8"),
        ("train.updates_per_epoch", 3, "updates_per_epoch=3 does not divide the epoch's 2 batches"),
        ("sample.sde_steps", 4, "sde_steps=4 steps do not fit in sde_range=(0, 3)"),
        ("sample.sde_range", (1, 9), "sde_range=(1, 9)"),
        ("train.advantage_std", "batch", "advantage_std='batch' must be one of group, global"),
        ("sample.sde", "ddim", "sde='ddim' must be one of flow_grpo_wan"),
        ("sample.noise_level", -0.5, "noise_level=-0.5"),
        ("train.clip_low", -1.0, "clip_low=-1.0"),
        ("train.kl_kind", "forward", "kl_kind='forward' must be one of flow_grpo"),
        ("train.learning_rate", -1.0, "learning_rate=-1.0"),
        ("train.ema_decay", 1.5, "ema_decay=1.5"),
        ("train.experts", ("transformer_3",), "experts=('transformer_3',)"),
        ("lora.rank", -2, "lora.rank=-2"),
        ("lora.targets", (), "lora.targets is empty"),
        ("eval.num_prompts", 1, "num_prompts=1"),
        ("reward.rule", "exact", "rule='exact' must be one of spelling"),
        ("reward.engine", "tesseract", "engine='tesseract' must be one of rapidocr"),
        ("reward.engine", "judge", "reward.servers=()"),
        ("reward.workers", -1, "workers=-1"),
        ("reward.workers", 1025, "workers=1025"),
        ("reward.max_frames", 0, "max_frames=0"),
        ("reward.retries", -1, "retries=-1"),
        ("reward.judge_question", "why", "'why' must be one of transcribe, yes_no, rate, letters"),
        ("reward.weights.ocr", 0.0, "reward.weights={'ocr': 0.0}"),
        ("reward.weights.clip", 1.0, "reward.clip_model=''"),
        ("model.remat", "all", "remat='all' must be one of auto, none, block, save_matmuls"),
        ("epochs", 0, "epochs=0"),
        ("sample.sde_window", "left", "sde_window='left' must be one of any, random, progressive"),
        ("sample.sde_window", "one_per_group", "sde_steps=2 must be 1"),
        ("sample.noise_level", 0.0, "sample.noise_level=0.0"),
        ("train.objective", "ppo", "objective='ppo' must be one of clip"),
        ("eval.solver", "heun", "solver='heun' must be one of unipc, euler"),
        ("model.attention", "flash", "attention='flash' must be one of auto"),
        ("save.keep", 0, "keep=0"),
        ("budget.evaluations", 0, "budget.evaluations=0 must be above 0"),
        ("budget.seconds", -1.0, "budget.seconds=-1.0"),
        ("eval.previews", -1, "previews=-1"),
        ("sample.shift", 0.0, "shift=0.0"),
        ("train.kl_as", "both", "kl_as='both' must be one of loss, reward"),
        ("train.kl_target", -1.0, "kl_target=-1.0"),
        ("train.best_of", 3, "best_of=3 best and as many worst"),
        ("eval.also_unguided", True, "eval.guidance=1.0"),
        ("train.cfg_distill_weight", -1.0, "distill_weight=-1.0"),
        ("sample.ode_solver", "heun", "ode_solver='heun' must be one of euler, dpmpp_2m"),
        ("train.groups", 3, "groups=3: only sample.groups=2"),
        ("train.groups", -1, "groups=-1"),
    ],
)
def test_a_bad_setting_is_refused(small, put, key, value, message):
    put(small, key, value)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        parse.from_config(small)
    assert str(error.value).startswith("config.")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora.init": "a.safetensors", "lora.rank": 0}, "lora.init=a.safetensors needs adapters"),
        (
            {"train.kl_as": "reward", "reward.combine": "advantages"},
            "reward.combine=advantages to be rewards",
        ),
        ({"train.kl_as": "reward", "train.kl_weight": 0.0}, "train.kl_weight=0.0 above 0"),
        (
            {"train.groups": 1, "sample.batch_size": 8, "train.updates_per_epoch": 1},
            "batch_size=8 must divide",
        ),
        ({"train.groups": 1}, "does not divide the epoch's 1 batches"),
        (
            {"train.groups": 1, "sample.sde_window": "one_per_group", "sample.sde_steps": 1},
            "train.groups=1 does not go with sample.sde_window=one_per_group",
        ),
        ({"train.credit": "otca", "sample.sde_steps": 1}, "sde_steps=1 leaves one"),
        ({"train.kl_reference": "average", "train.kl_as": "reward"}, "set train.kl_as=loss"),
        (
            {"train.kl_reference": "average", "train.kl_weight": 0.0},
            "kl_beta=0.0: an average as reference",
        ),
        ({"train.kl_reference": "average", "train.kl_reference_decay": 1.0}, "reference_decay=1.0"),
        ({"train.cfg_distill_weight": 0.1, "sample.guidance": 4.5}, "set sample.guidance=4.5 to 1"),
        (
            {"train.kl_target": 0.1, "train.kl_weight_range": (0.1, 0.2)},
            "must hold the first weight, 0.004",
        ),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(small, settings, message):
    small.update_from_flattened_dict({"train.updates_per_epoch": 2} | settings)
    with pytest.raises(UserError, match=re.escape(message)):
        parse.from_config(small)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("lora.targets", "to_q,to_out.0", ("to_q", "to_out.0")),
        ("lora.targets", "(to_q, ffn.net.2)", ("to_q", "ffn.net.2")),
        ("lora.targets", "('to_q', 'to_v')", ("to_q", "to_v")),
        ("lora.targets", '"to_q","to_v"', ("to_q", "to_v")),
        ("reward.panel", "dark,edges", ("dark", "edges")),
        ("reward.panel", "dark", ("dark",)),
        ("reward.panel", "('dark',)", ("dark",)),
        ("reward.panel", "", ()),
        ("reward.panel", "()", ()),
        ("reward.panel", "None", ()),
        ("reward.servers", "va=http://a:1,hps=http://b:2/x", ("va=http://a:1", "hps=http://b:2/x")),
        ("model.loras", "/a/b-1.safetensors:0.5,c", ("/a/b-1.safetensors:0.5", "c")),
        ("model.loras", "'HIGH,LOW:0.5'", ("HIGH,LOW:0.5",)),
        ("model.loras", "/it's/one", ("/it's/one",)),
        ("eval.more_frames", "9", (9,)),
        ("eval.more_frames", "9,17", (9, 17)),
        ("train.kl_weight_range", "1e-5,1", (1e-5, 1.0)),
        ("sample.frame_schedule", "(3,5),(6,9)", ((3, 5), (6, 9))),
    ],
)
def test_a_tuple_on_the_command_line_needs_no_quotes(key, text, value):
    more = {"sample.frame_schedule": ("eval.frames=5",)}.get(key, ())
    config = Method("a", "configs/tiny_ocr.py", (f"{key}={text}", *more)).config()
    assert parse.values_of(config)[key] == value


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("reward.panel=dark,'edges'", "reward.panel=dark,'edges': put quotes around each"),
        ("reward.panel=dark,egdes", "config.reward.panel=('dark', 'egdes') must be one of"),
        ("eval.more_frames=9,many", "config.eval.more_frames=('9', 'many') must be a tuple"),
    ],
)
def test_a_wrong_tuple_on_the_command_line(setting, message):
    with pytest.raises(UserError, match=re.escape(message)):
        Method("a", "configs/tiny_ocr.py", (setting,)).config()


def test_changes_of_size_after_a_checkpoint_may_differ(small):
    saved = small.to_dict()
    small.sample.size_schedule = ((5, 96, 192, 3.0),)
    (change,) = parse.check_resume(saved, small.to_dict(), "run", 4)
    assert change.startswith("sample.size_schedule [] -> [[5, 96, 192, 3.0]]")
    with pytest.raises(UserError, match=r"other settings \(sample\.size_schedule: "):
        parse.check_resume(saved, small.to_dict(), "run", 5)


def test_a_run_older_than_a_setting_is_continued_with_its_default(small):
    saved = small.to_dict()
    del saved["lora"]["init"]
    parse.check_resume(saved, small.to_dict(), "run")
    small.lora.init = "lora.safetensors"
    with pytest.raises(UserError, match=r"lora\.init: '' -> 'lora\.safetensors'"):
        parse.check_resume(saved, small.to_dict(), "run")


def test_a_run_older_than_the_choice_of_methods_is_of_flow_grpo(small):
    saved = small.to_dict()
    del saved["train"]["method"]
    parse.check_resume(saved, small.to_dict(), "run")
    small.train.method = "nft"
    with pytest.raises(UserError, match=r"train\.method: 'grpo' -> 'nft'"):
        parse.check_resume(saved, small.to_dict(), "run")


def test_a_run_with_a_setting_that_no_longer_exists_is_not_continued(small):
    saved = small.to_dict()
    saved["eval"]["of_old"] = saved["log"]["of_old"] = 1
    parse.check_resume(saved, small.to_dict(), "run")
    saved["train"]["of_old"] = 1
    with pytest.raises(UserError, match=r"train\.of_old: 1 -> None"):
        parse.check_resume(saved, small.to_dict(), "run")


@pytest.mark.parametrize("key, value", parse.REMOVED.items())
def test_a_run_that_left_a_removed_setting_as_it_was_is_continued(key, value, small):
    saved = small.to_dict()
    section, name = key.split(".")
    saved[section][name] = value
    parse.check_resume(saved, small.to_dict(), "run")
    saved[section][name] = "other"
    with pytest.raises(UserError, match=rf"{re.escape(key)}: 'other' -> None"):
        parse.check_resume(saved, small.to_dict(), "run")


def test_a_setting_of_none_is_not_taken_for_a_removed_one(small):
    small.reward.weights.ocr = None  # its default is 1
    parse.check_resume(small.to_dict(), small.to_dict(), "run")


def test_a_weight_without_data_is_left_out(small):
    """It is refused now; a run that had one and no data goes on without it."""
    saved = small.to_dict()
    saved["data"]["weight"] = 1.0
    parse.check_resume(saved, small.to_dict(), "run")
    saved["data"]["path"] = small.data.path = "data"
    with pytest.raises(UserError, match=r"data\.weight: 1\.0 -> 0\.01"):
        parse.check_resume(saved, small.to_dict(), "run")


def test_a_kl_weight_of_none_is_the_methods_own(small):
    saved = small.to_dict()
    saved["train"]["kl_weight"] = 0.004  # as it was before it could be None
    parse.check_resume(saved, small.to_dict(), "run")
    small.train.kl_weight = 0.01
    with pytest.raises(UserError, match=r"train\.kl_weight: 0\.004 -> 0\.01"):
        parse.check_resume(saved, small.to_dict(), "run")


def test_what_does_not_change_an_epoch_may_change_when_a_run_is_continued(small):
    saved = small.to_dict()
    small.epochs, small.eval.every, small.model.path, small.mesh.fsdp = 9, 7, "elsewhere", 2
    small.reward.servers, small.log.mlflow.uri = ("http://host:1",), "http://host:2"
    parse.check_resume(saved, small.to_dict(), "run")
    changed = parse.check_resume(saved, make_recipe(values_of(small)).to_dict(), "run")
    assert [text.partition(" ")[0] for text in changed] == ["epochs", "eval.every", "mesh.fsdp"]
    small.seed = 1
    with pytest.raises(UserError, match=r"\(seed: 0 -> 1\)"):
        parse.check_resume(saved, small.to_dict(), "run")


def test_the_size_of_updates_may_change_and_is_reported(small):
    saved = small.to_dict()
    assert parse.check_resume(saved, small.to_dict(), "run") == ()
    small.train.learning_rate, small.train.weight_decay, small.train.max_grad_norm = 5e-5, 0.0, 2.0
    rate, decay, norm = (
        saved["train"][key] for key in ("learning_rate", "weight_decay", "max_grad_norm")
    )
    assert parse.check_resume(saved, small.to_dict(), "run") == (
        f"train.learning_rate {rate!r} -> 5e-05",
        f"train.max_grad_norm {norm!r} -> 2.0",
        f"train.weight_decay {decay!r} -> 0.0",
    )


@pytest.mark.parametrize(("rank", "command"), [(4, "export_lora"), (0, "to_diffusers")])
def test_a_refusal_names_the_way_to_a_new_run(small, rank, command):
    small.lora.rank = rank
    saved = small.to_dict()
    small.train.warmup_updates = 3  # another form of the optimiser's state
    with pytest.raises(UserError) as refused:
        parse.check_resume(saved, small.to_dict(), "runs/one/checkpoints/4")
    text = str(refused.value)
    assert "train.warmup_updates: 0 -> 3" in text and "--config.run_dir" in text
    source = f"--src {saved['model']['path']} --checkpoint runs/one/checkpoints/4"
    assert f"convert.{command} {source} --dst" in text
    assert ("--config.lora.init" in text) == bool(rank) != ("--config.model.path" in text)


def test_another_name_of_the_same_file_does_not_end_a_run(small, tmp_path):
    small.prompts.train = str(tmp_path / "a")
    saved = small.to_dict()
    small.prompts.train = str(tmp_path / "b" / ".." / "a")
    parse.check_resume(saved, small.to_dict(), "run")
    small.prompts.train = str(tmp_path / "c")
    with pytest.raises(UserError, match=r"prompts\.train: "):
        parse.check_resume(saved, small.to_dict(), "run")

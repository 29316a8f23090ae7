"""VideoAlign at reduced size: the published formula, its files, and checkpoints that are wrong."""

import functools
import itertools
import json
import shutil

import numpy as np
import pytest

from rewards.base import PromptRecord, RewardError, Traits
from rewards.learned import videoalign
from rewards.learned.qwen2vl import MEAN, STD, plain_keys
from rewards.learned.videoalign import frame_indices
from rewards.own import OwnReward

NEEDS = "needs pip install -e '.[learned]'"
torch = pytest.importorskip("torch", reason=NEEDS)
tiny_models = pytest.importorskip("tests.rewards.learned.tiny_models", reason=NEEDS)

# exact on the CPU in float32, the default where there is no GPU
VideoAlign = functools.partial(videoalign.VideoAlign, device="cpu")
VIDEO = np.random.default_rng(0).integers(0, 256, (9, 30, 50, 3), np.uint8)
RED, BLUE = PromptRecord((), "a red sign"), PromptRecord((), "a blue sign")
NORMS = {"VQ": (3.6757, 2.2476), "MQ": (1.1646, 1.3811), "TA": (2.8105, 2.5121)}


@pytest.fixture(scope="module")
def reward(videoalign_files):
    folder, base, _ = videoalign_files
    return VideoAlign(str(folder), str(base))


@pytest.fixture
def copy(videoalign_files, tmp_path):
    """A copy of the checkpoint to damage."""
    shutil.copytree(videoalign_files[0], tmp_path, dirs_exist_ok=True)
    return tmp_path


# --- The formula, written again -------------------------------------------------------------------


def resized(video, size):
    frames = torch.tensor(video.transpose(0, 3, 1, 2), dtype=torch.float32)
    frames = torch.nn.functional.interpolate(frames, size, mode="bicubic", antialias=True)
    return frames.clamp(0, 255).round().numpy()


def rows(frames):
    """The rows of patches, one by one: pairs of frames, then 2 x 2 neighbours, then pixels."""
    pixels = (frames / 255 - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1))
    height, width = pixels.shape[2:]
    return np.stack(
        [
            pixels[t : t + 2, :, y : y + 14, x : x + 14].transpose(1, 0, 2, 3).ravel()
            for t in range(0, len(pixels), 2)
            for top, left in itertools.product(range(0, height, 28), range(0, width, 28))
            for y, x in itertools.product((top, top + 14), (left, left + 14))
        ]
    )


def expected(base, weights, frames, prompt):
    """The raw outputs at the special tokens. The language model gets no positions, as in the
    published code, so those of all tokens are consecutive.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(base)
    config.text_config.vocab_size = len(weights["language_model.embed_tokens.weight"])
    model = transformers.Qwen2VLModel(config).eval()
    model.load_state_dict({k: v for k, v in weights.items() if not k.startswith("rm_head")})
    words = tiny_models.tokenizer()
    words.add_special_tokens({"additional_special_tokens": [f"<|{n}_reward|>" for n in NORMS]})
    pixels = torch.tensor(rows(frames), dtype=torch.float32)
    grid = torch.tensor([[len(frames) // 2, frames.shape[2] // 14, frames.shape[3] // 14]])
    text = (
        "<|im_start|> user <|vision_start|> "
        + "<|video_pad|> " * (len(pixels) // 4)
        + "<|vision_end|> "
        + tiny_models.QUESTION.format(text_prompt=prompt)
        + " <|im_end|> <|im_start|> assistant"
    )
    ids = torch.tensor([words(text)["input_ids"]])
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(ids).clone()
        seen = model.visual(pixels, grid_thw=grid)
        embeddings[ids == config.video_token_id] = getattr(seen, "pooler_output", seen)
        hidden = model.language_model(inputs_embeds=embeddings).last_hidden_state[0]
        where = [
            ids[0].tolist().index(words.convert_tokens_to_ids(f"<|{n}_reward|>")) for n in NORMS
        ]
        return (hidden[where] @ weights["rm_head.weight"].T).numpy()  # [3, outputs]


def test_the_published_formula(videoalign_files, reward):
    _, base, weights = videoalign_files
    # 9 frames at 16 per second and 2 a second are fewer than 4; 30 x 50 pixels grow to 252 x 420
    frames = resized(VIDEO[[0, 3, 5, 8]], (252, 420))
    score = reward.score(VIDEO, RED)
    raw = expected(base, weights, frames, RED.prompt)[:, 0]
    for value, (name, (mean, std)) in zip(raw, NORMS.items()):
        # float32 sums of at most a few hundred terms of size 1
        assert score[name] == pytest.approx((value - mean) / std, abs=1e-4)
    assert np.ptp(raw) > 1e-2


def test_of_three_outputs_each_token_has_its_own(tmp_path):
    base, weights = tiny_models.videoalign(tmp_path, outputs=3)
    score = VideoAlign(str(tmp_path), str(base)).score(VIDEO, RED)
    raw = expected(base, weights, resized(VIDEO[[0, 3, 5, 8]], (252, 420)), RED.prompt)
    for i, (name, (mean, std)) in enumerate(NORMS.items()):
        assert score[name] == pytest.approx((raw[i, i] - mean) / std, abs=1e-4)


def test_only_text_alignment_sees_the_prompt(reward):
    red, blue = reward.score(VIDEO, RED), reward.score(VIDEO, BLUE)
    assert red["TA"] != blue["TA"] and (red["VQ"], red["MQ"]) == (blue["VQ"], blue["MQ"])


def test_a_batch_has_the_scores_of_its_videos(reward):
    long = PromptRecord((), "a blue sign a red prompt a quality sign")
    videos, requests = [VIDEO, 255 - VIDEO], [RED, long]
    for one, score in zip(zip(videos, requests), reward.score_batch(videos, requests)):
        assert score == pytest.approx(reward.score(*one), abs=1e-5)


def test_motion_without_colours(videoalign_files, reward):
    folder, base, _ = videoalign_files
    grey = VideoAlign(str(folder), str(base), grey_motion=True)
    score, plain = grey.score(VIDEO, RED), reward.score(VIDEO, RED)
    assert score["MQ"] != plain["MQ"]
    assert {k: score[k] for k in ("VQ", "TA")} == {k: plain[k] for k in ("VQ", "TA")}
    colourless = np.repeat(VIDEO[..., :1], 3, -1)
    assert grey.score(colourless, RED) == pytest.approx(reward.score(colourless, RED), abs=1e-4)


def test_as_a_reward_it_has_parts_whose_sum_is_the_value(reward):
    own = OwnReward.of("va", lambda: reward)
    score = own.score(VIDEO, RED)
    assert [name for name, _ in score.parts] == ["VQ", "MQ", "TA"]
    assert score.value == pytest.approx(sum(value for _, value in score.parts))
    assert Traits.of(own) == Traits(batched=True, needs_prompt=True)


@pytest.mark.parametrize(
    "frames, fps, sample, count",
    [
        (81, 16, 2, 10),  # 10.1
        (121, 24, 2, 10),  # 10.08
        (33, 16, 2, 4),  # 4.1
        (49, 16, 2, 6),  # 6.1
        (9, 16, 2, 4),
        (5, 16, 2, 4),
        (3, 16, 2, 2),
        (81, 16, 16, 80),
        (2000, 16, 16, 768),
    ],
)
def test_the_frames_that_are_judged(frames, fps, sample, count):
    indices = frame_indices(frames, fps, sample)
    assert len(indices) == count and (indices[0], indices[-1]) == (0, frames - 1)
    assert np.ptp(np.diff(indices)) <= 1


# --- What is refused ------------------------------------------------------------------------------


def refusal(folder, base, **options):
    with pytest.raises(RewardError) as error:
        VideoAlign(str(folder), str(base), **options)
    message = str(error.value)
    assert len(message.splitlines()) == 1
    return message


def change_weights(folder, change):
    file = folder / "checkpoint-12" / "model.pth"
    state = torch.load(file)
    change(state)
    torch.save(state, file)


HEAD = "base_model.model.rm_head.weight"
NORM = "base_model.model.model.norm.weight"
ADAPTER = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
DAMAGE = {
    "no head": (lambda s: s.pop(HEAD), "rm_head"),
    "another head": (lambda s: s.update({HEAD: torch.ones(4, 16)}), "weight (4, 16)"),
    "an untrained head": (lambda s: s.update({HEAD: torch.zeros(1, 16)}), "no trained weights"),
    "a broken head": (lambda s: s.update({HEAD: torch.full((1, 16), torch.nan)}), "finite"),
    "a missing weight": (
        lambda s: s.pop(NORM),
        "1 weights are missing, such as language_model.norm",
    ),
    "half an adapter": (lambda s: s.pop(ADAPTER), "(adapter)"),
    "another model": (lambda s: s.update({NORM: torch.ones(8)}), "norm.weight (8,)"),
    "an unknown weight": (lambda s: s.update({"model.other": torch.ones(1)}), "other"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_wrong_weights_are_refused(videoalign_files, copy, name):
    change, named = DAMAGE[name]
    change_weights(copy, change)
    assert named in refusal(copy, videoalign_files[1])


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"data_config__prompt_template_type": "none"}, "prompt_template_type='none'"),
        ({"data_config__sample_type": "multi_pts"}, "sample_type='multi_pts'"),
        ({"model_config__output_dim": 2}, "output_dim=2"),
        ({"model_config__use_special_tokens": False}, "use_special_tokens=False"),
    ],
)
def test_another_kind_of_checkpoint_is_refused(videoalign_files, copy, changes, named):
    tiny_models.write_config(copy, **changes)
    assert named in refusal(copy, videoalign_files[1])


def test_missing_files_are_named(videoalign_files, copy, tmp_path_factory):
    _, base, _ = videoalign_files
    empty = tmp_path_factory.mktemp("empty")
    assert "'/no/such/folder'" in refusal("/no/such/folder", base)
    assert "model_config.json" in refusal(empty, base)
    assert str(empty) in refusal(copy, empty)
    assert "{text_prompt}" in refusal(copy, base, template=str(copy / "model_config.json"))
    assert "sample_fps=0" in refusal(copy, base, sample_fps=0)
    assert "dtype='int8'" in refusal(copy, base, dtype="int8")
    assert "device='tpu'" in refusal(copy, base, device="tpu")
    (copy / "prompt_template.py").unlink()
    assert "prompt_template.py" in refusal(copy, base)
    config = tiny_models.video_config()
    del config["inference_config"]
    (copy / "model_config.json").write_text(json.dumps(config))
    assert "inference_config" in refusal(copy, base)
    tiny_models.write_config(copy)
    (copy / "checkpoint-12" / "model.pth").write_bytes(b"nothing")
    (copy / "prompt_template.py").write_text(
        f"DETAILED_PROMPT_WITH_SPECIAL_TOKEN = {tiny_models.QUESTION!r}"
    )
    assert "model.pth" in refusal(copy, base)


@pytest.mark.parametrize(
    "video, request_, named",
    [
        (VIDEO[:1], RED, "got 1"),
        (VIDEO, ("red",), "prompt"),
        (VIDEO, PromptRecord((), "a <|video_pad|> sign"), "<|video_pad|>"),
        (VIDEO, PromptRecord((), "a <|TA_reward|> sign"), "<|TA_reward|>"),
        (np.zeros((4, 2, 402, 3), np.uint8), RED, "2x402"),
    ],
)
def test_what_cannot_be_scored_is_an_error_not_zero(reward, video, request_, named):
    with pytest.raises(RewardError) as error:
        reward.score(video, request_)
    assert named in str(error.value)


# --- Names and adapters ---------------------------------------------------------------------------


def test_an_adapter_over_the_base_model_gives_the_same_scores(copy, reward):
    """The other form of a checkpoint: the adapter, and what was trained beside it."""
    from safetensors.torch import save_file

    place = copy / "checkpoint-12"
    state = torch.load(place / "model.pth")
    (place / "model.pth").unlink()
    adapter = {k.replace(".default", ""): v for k, v in state.items() if ".lora_" in k}
    save_file(adapter, place / "adapter_model.safetensors")
    beside = {k: v for k, v in state.items() if "embed_tokens" in k or "rm_head" in k}
    torch.save(beside, place / "non_lora_state_dict.pth")
    own = copy / "base"
    plain = {
        k.removeprefix("base_model.model.").replace(".base_layer", ""): v.contiguous()
        for k, v in state.items()
        if ".lora_" not in k and "rm_head" not in k
    }
    save_file(plain, own / "model.safetensors")
    assert VideoAlign(str(copy), str(own)).score(VIDEO, RED) == reward.score(VIDEO, RED)
    beside.pop("base_model.model.model.embed_tokens.weight")
    torch.save(beside, place / "non_lora_state_dict.pth")
    assert "embeddings" in refusal(copy, own)
    (place / "adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors" in refusal(copy, own)


def test_names_and_sums_are_those_of_peft(videoalign_files):
    peft = pytest.importorskip("peft", reason="needs pip install -e '.[parity]'")
    import transformers

    _, base, weights = videoalign_files
    config = transformers.AutoConfig.from_pretrained(base)
    model = transformers.Qwen2VLForConditionalGeneration(config)
    wrapped = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=4, lora_alpha=12, target_modules=["q_proj", "down_proj"], init_lora_weights=False
        ),
    )
    plain = plain_keys(wrapped.state_dict(), 3.0)
    merged = wrapped.merge_and_unload().model.state_dict()
    assert plain.keys() == merged.keys() == (weights.keys() - {"rm_head.weight"})
    for key, value in merged.items():
        torch.testing.assert_close(plain[key], value)


def test_the_published_checkpoint_has_as_many_weights():
    """1,123, as others count in the published file (Tencent-Hunyuan/UniRL, pull request 97): a
    Qwen2-VL of 2B whose language model has an adapter on each matrix, and the head.
    """
    peft = pytest.importorskip("peft", reason="needs pip install -e '.[parity]'")
    import transformers

    config = transformers.Qwen2VLConfig(
        text_config=dict(
            hidden_size=1536,
            intermediate_size=8960,
            num_hidden_layers=28,
            num_attention_heads=12,
            num_key_value_heads=2,
        ),
        vision_config=dict(hidden_size=1536),
    )
    with torch.device("meta"):
        model = transformers.Qwen2VLForConditionalGeneration(config)
        names = set(model.model.state_dict())
        targets = [
            name
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and "language_model" in name
        ]
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=64, target_modules=targets))
    stored = wrapped.state_dict() | {HEAD: torch.empty(1, 1536, device="meta")}
    assert len(stored) == 1123
    assert plain_keys(stored, 2.0).keys() == names | {"rm_head.weight"}

"""HPSv3 at reduced size: the published formula, and checkpoints that are wrong."""

import functools

import numpy as np
import pytest
from PIL import Image

from rewards.base import PromptRecord, RewardError
from rewards.learned import hpsv3
from rewards.learned.qwen2vl import smart_size

NEEDS = "needs pip install -e '.[learned]'"
torch = pytest.importorskip("torch", reason=NEEDS)
tiny_models = pytest.importorskip("tests.rewards.learned.tiny_models", reason=NEEDS)
safetensors = pytest.importorskip("safetensors.torch", reason=NEEDS)

# exact on the CPU in float32, the default where there is no GPU
HPSv3 = functools.partial(hpsv3.HPSv3, device="cpu")
VIDEO = np.random.default_rng(0).integers(0, 256, (5, 30, 50, 3), np.uint8)
RED = PromptRecord((), "a red sign")


@pytest.fixture(scope="module")
def reward(hpsv3_files):
    folder, base, _ = hpsv3_files
    return HPSv3(str(folder), str(folder / "hpsv3"), str(base), max_frames=2)


def expected(base, weights, frame, prompt):
    """The head's mean, with transformers' own preparation of the picture."""
    import transformers

    # that of Pillow, where there are two
    preparation = getattr(
        transformers, "Qwen2VLImageProcessorPil", transformers.Qwen2VLImageProcessor
    )
    height, width = smart_size(frame.shape[:2], 256 * 784, 256 * 784)
    picture = Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC)
    inputs = preparation()(images=[picture], return_tensors="pt")
    config = transformers.AutoConfig.from_pretrained(base)
    config.text_config.vocab_size = len(weights["language_model.embed_tokens.weight"])
    model = transformers.Qwen2VLModel(config).eval()
    model.load_state_dict({k: v for k, v in weights.items() if not k.startswith("rm_head")})
    words = tiny_models.tokenizer()
    words.add_special_tokens({"additional_special_tokens": [hpsv3.TOKEN]})
    text = (
        "<|im_start|> user <|vision_start|> "
        + "<|image_pad|> " * (len(inputs["pixel_values"]) // 4)
        + f"<|vision_end|> rate prompt {prompt} quality <|Reward|> quality <|im_end|> "
        + "<|im_start|> assistant"
    )
    ids = torch.tensor([words(text)["input_ids"]])
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(ids).clone()
        seen = model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
        embeddings[ids == config.image_token_id] = getattr(seen, "pooler_output", seen)
        hidden = model.language_model(inputs_embeds=embeddings).last_hidden_state[0]
        out = hidden[ids[0].tolist().index(words.convert_tokens_to_ids(hpsv3.TOKEN))]
        for layer in (0, 3, 5):
            out = out @ weights[f"rm_head.{layer}.weight"].T + weights[f"rm_head.{layer}.bias"]
            out = out if layer == 5 else out.clamp(min=0)
    return float(out[0])


def test_the_published_formula(hpsv3_files, reward):
    _, base, weights = hpsv3_files
    score = reward.score(VIDEO, RED)
    means = [expected(base, weights, VIDEO[i], RED.prompt) for i in (0, 4)]
    assert score.frames == (0, 4) and abs(means[0] - means[1]) > 1e-4
    np.testing.assert_allclose(score.frame_values, means, atol=1e-5)
    assert score.value == pytest.approx(np.mean(means), abs=1e-5)


def test_the_prompt_counts_and_a_batch_has_the_scores_of_its_videos(reward):
    blue = PromptRecord((), "a blue sign a blue sign")
    red, other = reward.score_batch([VIDEO, VIDEO], [RED, blue])
    assert red.value != pytest.approx(other.value, abs=1e-5)
    assert other.frame_values == pytest.approx(reward.score(VIDEO, blue).frame_values, abs=1e-5)


def test_one_frame_is_the_middle_one(hpsv3_files, reward):
    folder, base, _ = hpsv3_files
    single = HPSv3(str(folder / "HPSv3.safetensors"), str(folder), str(base), max_frames=1)
    assert single.score(VIDEO, RED).frames == (2,)
    assert single.score(VIDEO[:1], RED).frames == (0,)


@pytest.mark.parametrize(
    "size, bounds, result",
    [
        ((480, 832), (100_352, 200_704), (336, 588)),  # sides over 1.41, rounded down
        ((64, 128), (100_352, 200_704), (224, 448)),  # times 3.5, rounded up
        ((300, 400), (100_352, 200_704), (308, 392)),  # rounded to 28
    ],
)
def test_sizes_by_hand(size, bounds, result):
    assert smart_size(size, *bounds) == result


def refusal(*arguments, **options):
    with pytest.raises(RewardError) as error:
        HPSv3(*map(str, arguments), **options)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def test_what_is_refused(hpsv3_files, tmp_path):
    folder, base, _ = hpsv3_files
    code = folder / "hpsv3"
    weights = safetensors.load_file(folder / "HPSv3.safetensors")
    file = tmp_path / "HPSv3.safetensors"
    safetensors.save_file({k: v for k, v in weights.items() if not k.startswith("rm_head")}, file)
    assert "no head" in refusal(file, code, base)
    linear = {k: v for k, v in weights.items() if not k.startswith("rm_head")}
    safetensors.save_file(linear | {"rm_head.weight": torch.ones(1, 16)}, file)
    assert "head" in refusal(file, code, base)  # that of VideoAlign
    safetensors.save_file(weights | {"visual.merger.mlp.0.weight": torch.ones(2, 2)}, file)
    assert "visual.merger.mlp.0.weight (2, 2)" in refusal(file, code, base)
    assert "max_frames=0" in refusal(folder, code, base, max_frames=0)
    (tmp_path / "question.txt").write_text("rate {text_prompt}")
    assert hpsv3.TOKEN in refusal(folder, tmp_path / "question.txt", base)
    (tmp_path / "one.py").write_text('INSTRUCTION = "a"\nprompt_with_special_token = "b"\n')
    (tmp_path / "two.py").write_text('INSTRUCTION = "c"\n')
    assert "INSTRUCTION twice" in refusal(folder, tmp_path, base)
    assert "prompt_with_special_token" in refusal(folder, tmp_path / "two.py", base)

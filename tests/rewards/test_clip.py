"""CLIP rewards with a tiny random model: the formula, errors, and in a composite in a worker."""

import functools
import json
import re
import shutil

import numpy as np
import pytest

from rewards.base import PromptRecord, RewardError
from rewards.clip import ClipReward, check_model
from rewards.composite import CompositeReward
from rewards.pool import RewardPool
from tests.rewards.pool_rewards import Targets

torch = pytest.importorskip("torch", reason="needs pip install -e '.[clip]'")
PROMPT = "a red sign that says open"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a model as transformers writes it: 16 x 16 pixels, words as tokens."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    folder = tmp_path_factory.mktemp("clip")
    words = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *PROMPT.split(), "blue"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 1)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
    size = dict(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        projection_dim=8,
    )
    text = dict(
        size,
        vocab_size=len(words),
        max_position_embeddings=12,
        eos_token_id=1,
        bos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config=text, vision_config=dict(size, image_size=16, patch_size=8), projection_dim=8
    )
    transformers.CLIPModel(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "image_processor_type": "CLIPImageProcessor",
                "do_resize": True,
                "size": {"shortest_edge": 16},
                "do_center_crop": True,
                "crop_size": {"height": 16, "width": 16},
                "do_normalize": True,
                "image_mean": [0.5, 0.4, 0.3],
                "image_std": [0.25, 0.3, 0.35],
                "do_rescale": True,
                "resample": 3,
            }
        )
    )
    return folder


def videos(n=1, frames=12):
    return np.random.default_rng(0).integers(0, 256, (n, frames, 16, 16, 3), np.uint8)


def cosines(model, frames):
    """The cosines by the parts of the model: pooled states, projections, norms."""
    import transformers

    clip = transformers.CLIPModel.from_pretrained(model)
    pixels = (frames / 255 - np.array([0.5, 0.4, 0.3])) / np.array([0.25, 0.3, 0.35])
    tokens = torch.tensor([[3, 4, 5, 6, 7, 8, 1]])
    with torch.no_grad():
        image = clip.visual_projection(
            clip.vision_model(
                torch.tensor(pixels.transpose(0, 3, 1, 2), dtype=torch.float32)
            ).pooler_output
        ).numpy()
        text = clip.text_projection(clip.text_model(tokens).last_hidden_state[:, -1]).numpy()[0]
    return image @ text / np.linalg.norm(image, axis=1) / np.linalg.norm(text)


def test_the_formula(model):
    (video,) = videos()
    score = ClipReward(str(model), max_frames=3).score(video, PromptRecord(("open",), PROMPT))
    assert score.frames == (0, 6, 11)
    expected = cosines(model, video[[0, 6, 11]])
    np.testing.assert_allclose(score.frame_values, expected, atol=1e-5)
    assert score.value == pytest.approx(expected.mean(), abs=1e-5) and np.ptp(expected) > 1e-4
    picked = ClipReward(str(model), "pickscore", 3).score(video, PromptRecord(("open",), PROMPT))
    assert picked.value == pytest.approx(np.exp(2.6592) * expected.mean() / 26, abs=1e-5)
    long = ClipReward(str(model), max_frames=3).score(video, PromptRecord(("open",), "blue " * 50))
    assert np.isfinite(long.value) and long.value != score.value


def test_what_is_refused(model, tmp_path, monkeypatch):
    with pytest.raises(RewardError, match="prompt"):
        ClipReward(str(model)).score(videos()[0], ("open",))
    with pytest.raises(ValueError, match="kind 'siglip'"):
        ClipReward(str(model), "siglip")
    with pytest.raises(ValueError, match=re.escape(repr(str(tmp_path)))):
        check_model(str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ValueError, match="PyTorch"):
        check_model(str(model))


def test_weights_that_are_missing_are_refused(model, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["text_projection.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RewardError, match=r"text_projection\.weight") as error:
        ClipReward(str(tmp_path))
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.slow
def test_in_a_composite_only_clip_gets_the_prompt(model):
    record = PromptRecord(("open",), PROMPT)
    factories = {"ocr": Targets, "clip": functools.partial(ClipReward, str(model), "clip", 3)}
    with RewardPool(functools.partial(CompositeReward, factories), workers=1) as pool:
        scores = pool.submit(videos(2), [record] * 2).result()
    assert scores.valid.all() and scores.texts == ["open", "open"]
    np.testing.assert_allclose(
        scores.parts["clip"], [cosines(model, v[[0, 6, 11]]).mean() for v in videos(2)], atol=1e-5
    )

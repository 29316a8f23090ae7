"""Any question: places, patterns, failures in a pool, an endpoint and a model in this process."""

import json

import numpy as np
import pytest

from rewards.base import PromptRecord, RewardError
from rewards.learned.question import AnswerReader, Question, fill
from rewards.own import OwnReward
from rewards.pool import RewardPool
from tests.rewards.serving import scripted

VIDEOS = np.random.default_rng(0).integers(0, 256, (3, 4, 8, 16, 3), np.uint8)
RECORD = PromptRecord(("OPEN", "24 h"), 'a {blue} sign "OPEN"', {"style": "oil {prompt}"})


def test_places_are_filled_once():
    asked = fill("{style}, {targets}; {prompt} {1,2} { }", RECORD)
    assert asked == 'oil {prompt}, "OPEN" and "24 h"; a {blue} sign "OPEN" {1,2} { }'
    with pytest.raises(RewardError, match=r"\{colour\}"):
        fill("Is it {colour}?", RECORD)


@pytest.mark.parametrize(
    "pattern, options, answer, value",
    [
        (r"score: *(\d+)", {}, "Score: 3? No. SCORE: 8", 0.8),
        (r"(-?[\d.]+)", {"bounds": (-1, 1)}, "-0.5", 0.25),
        (r"\b(yes|no)\b", {"values": {"Yes": 1, "no": -1}}, "Is it? No.", -1.0),
        (r"score: *(\d+)", {}, "8", None),
        (r"(\d+)", {}, "11", None),
        (r"(\w+)", {}, "good", None),
        (r"(\w+)", {"values": {"yes": 1}}, "maybe", None),
        (r"a(\d)?", {}, "a", None),
        (r"(.*)", {"bounds": (0, 1)}, "nan", None),
    ],
)
def test_answers(pattern, options, answer, value):
    reader = AnswerReader(pattern, **{"values": None, "bounds": (0, 10)} | options)
    if value is None:
        with pytest.raises(RewardError):
            reader(answer)
    else:
        assert reader(answer) == {"": pytest.approx(value)}


@pytest.mark.parametrize(
    "options, named",
    [
        ({"pattern": "("}, "'('"),
        ({"pattern": r"\d+"}, "group"),
        ({"values": {"yes": "high"}}, "high"),
        ({"bounds": (1, 1)}, "bounds"),
        ({"bounds": (1,)}, "bounds"),
        ({"max_frames": 1}, "max_frames=1"),
        ({"path": "a/b"}, "path='a/b'"),
        ({"urls": []}, "urls=[]"),
    ],
)
def test_settings_that_cannot_work(options, named):
    with pytest.raises(RewardError) as error:
        Question(**{"question": "?", "pattern": "(.)", "urls": ["http://x:1"]} | options)
    assert named in str(error.value)


def test_an_endpoint_answers_and_failures_are_counted_not_zero(monkeypatch):
    monkeypatch.setenv("A_TOKEN", "secret")
    asked = []

    def answer(method, path, headers, body):
        if path == "/v1/models":
            return 200, {"object": "list", "data": [{"id": "eye"}]}
        content = json.loads(body)["messages"][0]["content"]
        asked.append((len(content) - 1, content[-1]["text"], headers["Authorization"]))
        text = "look 6, move 2" if len(asked) == 1 else "I cannot say"
        return 200, {"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}

    with scripted(answer) as url:
        options = {"urls": [url], "token_env": "A_TOKEN", "max_frames": 2, "patience": 2.0}
        question = Question("Rate {targets}.", r"look (?P<look>\d), move (?P<move>\d)", **options)
        with RewardPool(lambda: OwnReward.of("style", lambda: question), 1, "thread") as pool:
            scores = pool.submit(VIDEOS, [RECORD] * 3).result()
    assert asked[0] == (2, 'Rate "OPEN" and "24 h".', "Bearer secret")
    assert scores.parts["look"][0] == pytest.approx(0.6) and scores.parts["move"][0] == 0.2
    assert scores.values[0] == pytest.approx(0.8) and scores.texts[0] == "look 6, move 2"
    assert scores.valid.tolist() == [True, False, False] and scores.failures == 2
    assert np.isnan(scores.values[1:]).all() and "I cannot say" in scores.errors[1]


# --- A model in this process ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a tiny LLaVA with random weights, whose words are mostly numbers."""
    torch = pytest.importorskip("torch", reason="needs pip install -e '.[learned]'")
    import transformers

    from tests.rewards.learned.tiny_models import tokenizer

    folder = tmp_path_factory.mktemp("llava")
    numbers = [str(i) for i in range(1, 40)]
    words = tokenizer(
        ["<unk>", "user", "assistant", "rate", "red", "blue", *numbers],
        ["<image>", "<|end|>", "<|im_start|>", "<|im_end|>"],
        eos_token="<|end|>",
        pad_token="<|end|>",
    )
    words.chat_template = (
        "{% for part in messages[0]['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
        "{% else %}<image> {% endif %}{% endfor %}{% if add_generation_prompt %} assistant{% endif %}"
    )
    size = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    torch.manual_seed(0)
    llava = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(**size, image_size=16, patch_size=8),
            text_config=transformers.LlamaConfig(
                **size, num_key_value_heads=2, vocab_size=len(words)
            ),
            image_token_id=words.convert_tokens_to_ids("<image>"),
            vision_feature_layer=-1,
        )
    )
    for parameter in llava.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    llava.generation_config.eos_token_id = words.eos_token_id
    llava.save_pretrained(folder)
    preparation = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    processor = transformers.LlavaProcessor(
        image_processor=preparation(
            size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
        ),
        tokenizer=words,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
    )
    processor.chat_template = words.chat_template
    processor.save_pretrained(folder)
    return folder


def test_a_model_of_this_process_answers_as_its_greedy_continuation(model):
    import torch
    import transformers

    from rewards.learned.local_model import LocalModel

    llava = transformers.LlavaForConditionalGeneration.from_pretrained(model)
    processor = transformers.AutoProcessor.from_pretrained(model)
    inputs = processor(
        images=list(VIDEOS[0, :2]), text="<image> <image> rate red assistant", return_tensors="pt"
    )
    words = []
    for _ in range(3):
        with torch.no_grad():
            token = int(llava(**inputs).logits[0, -1].argmax())
        words.append(token)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[token]])], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    judge = LocalModel(str(model), device="cpu", max_tokens=3)
    judge.model.generation_config.eos_token_id = words[-1]
    answer = judge.ask("rate red", VIDEOS[0, :2])
    assert answer == processor.decode(words[: words.index(words[-1]) + 1], skip_special_tokens=True)
    judge.model.generation_config.eos_token_id = None
    with pytest.raises(RewardError, match="3 tokens"):
        judge.ask("rate red", VIDEOS[0, :2])


def test_a_question_to_a_model_of_this_process(model, monkeypatch):
    reward = Question(
        "rate red", r"^(\S+)", bounds=(0, 40), path=str(model), max_tokens=2, device="cpu"
    )
    judge, seen = reward.judge, []
    generate = judge.model.generate

    def record(**inputs):
        seen.append(inputs)
        output = generate(**inputs)
        judge.model.generation_config.eos_token_id = int(output[0, -1])  # so it is complete
        return output

    monkeypatch.setattr(judge.model, "generate", record)
    score = reward.score(VIDEOS[0], RECORD)
    assert score.value == float(score.text.split()[0]) / 40 and score.frames == (0, 1, 2, 3)
    frames = judge.processor.image_processor(list(VIDEOS[0]), return_tensors="pt")
    assert (seen[0]["pixel_values"] == frames["pixel_values"]).all()
    assert not seen[0]["do_sample"] and reward.score(VIDEOS[0], RECORD) == score


def test_weights_that_are_missing_are_refused(model, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(model, tmp_path, dirs_exist_ok=True)
    state = load_file(tmp_path / "model.safetensors")
    lost = next(key for key in state if "mlp.down_proj" in key)
    del state[lost]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RewardError, match=r"mlp\.down_proj") as error:
        Question("?", "(.)", path=str(tmp_path))
    assert len(str(error.value).splitlines()) == 1
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RewardError, match="path="):
        Question("?", "(.)", path=str(tmp_path))

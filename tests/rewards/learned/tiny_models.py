"""Published models at reduced size with random weights, written as their checkpoints are."""

import json

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

MARKS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
WORDS = ("<unk>", "user", "assistant", "a", "red", "blue", "sign", "rate", "quality", "prompt")
CHAT = (
    "{% for message in messages %}<|im_start|> {{ message['role'] }} "
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% else %}<|vision_start|> <|{{ part['type'] }}_pad|> <|vision_end|> {% endif %}{% endfor %}"
    " <|im_end|> {% endfor %}{% if add_generation_prompt %}<|im_start|> assistant{% endif %}"
)


def tokenizer(words=WORDS, marks=MARKS, **options):
    """A tokenizer of words, with the marks of Qwen2-VL as special tokens."""
    known = {word: i for i, word in enumerate([*words, *marks])}
    inner = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens([AddedToken(mark, normalized=False) for mark in marks])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="<unk>",
        chat_template=CHAT,
        model_input_names=["input_ids", "attention_mask"],
        **options,
    )


def qwen2vl(folder, extra):
    """Write configuration and tokenizer of a Qwen2-VL to `folder`; return the random weights of one
    that has `extra` tokens more, by the names of `transformers.Qwen2VLModel`.
    """
    words = tokenizer()
    words.save_pretrained(folder)
    config = {  # in the form of the published ones
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_theta": 10_000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]},
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "vision_config": {"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 16},
        "image_token_id": words.convert_tokens_to_ids("<|image_pad|>"),
        "video_token_id": words.convert_tokens_to_ids("<|video_pad|>"),
        "vision_start_token_id": words.convert_tokens_to_ids("<|vision_start|>"),
        "vision_end_token_id": words.convert_tokens_to_ids("<|vision_end|>"),
    }
    (folder / "config.json").write_text(json.dumps(config))
    config = transformers.AutoConfig.from_pretrained(folder)
    config.text_config.vocab_size = len(words) + extra
    torch.manual_seed(0)
    model = transformers.Qwen2VLModel(config)
    for parameter in model.parameters():  # the published initialisation is nearly constant
        torch.nn.init.normal_(parameter, std=0.2)
    return {key: value.clone() for key, value in model.state_dict().items()}


def old_names(weights):
    """The same weights by the names of transformers before 4.52."""
    return {
        key.replace("language_model.", "model.") if key.startswith("language_model.") else key: v
        for key, v in weights.items()
    }


def video_config(**changes):
    """VideoAlign's model_config.json, with its published numbers."""
    config = {
        "data_config": {
            "fps": 2.0,
            "max_frame_pixels": 200704,
            "num_frames": None,
            "sample_type": "uniform",
            "prompt_template_type": "detailed_special",
        },
        "model_config": {
            "model_name_or_path": "Qwen/Qwen2-VL-2B-Instruct",
            "output_dim": 1,
            "use_special_tokens": True,
        },
        "peft_lora_config": {"lora_r": 4, "lora_alpha": 8, "use_rslora": False},
        "inference_config": {
            "VQ_mean": 3.6757,
            "VQ_std": 2.2476,
            "MQ_mean": 1.1646,
            "MQ_std": 1.3811,
            "TA_mean": 2.8105,
            "TA_std": 2.5121,
        },
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        config[section][name] = value
    return config


QUESTION = (
    "rate quality <|VQ_reward|> rate <|MQ_reward|> prompt {text_prompt} rate <|TA_reward|> quality"
)


def videoalign(folder, outputs=1):
    """Write a VideoAlign checkpoint as it is published: model.pth with an adapter that is not
    merged, the names of PEFT and of transformers 4.45. Return (folder of the base, the weights
    merged, by today's names).
    """
    base = folder / "base"
    weights = qwen2vl(base, 3)
    generator = torch.Generator().manual_seed(1)
    head = torch.randn(outputs, 16, generator=generator)
    stored = {f"base_model.model.{key}": value for key, value in old_names(weights).items()}
    stored["base_model.model.rm_head.weight"] = head
    stored["base_model.model.lm_head.weight"] = torch.zeros(22, 16)
    merged = dict(weights, **{"rm_head.weight": head})
    for layer in (0, 1):
        name = f"layers.{layer}.self_attn.q_proj"
        old = f"base_model.model.model.{name}"
        a, b = (torch.randn(shape, generator=generator) * 2 for shape in ((4, 16), (16, 4)))
        stored[f"{old}.base_layer.weight"] = stored.pop(f"{old}.weight")
        stored[f"{old}.base_layer.bias"] = stored.pop(f"{old}.bias")
        stored[f"{old}.lora_A.default.weight"], stored[f"{old}.lora_B.default.weight"] = a, b
        merged[f"language_model.{name}.weight"] = (
            weights[f"language_model.{name}.weight"] + 8 / 4 * b @ a
        )
    place = folder / "checkpoint-12"
    place.mkdir()
    torch.save(stored, place / "model.pth")
    write_config(folder, model_config__output_dim=outputs)
    (folder / "prompt_template.py").write_text(
        f'OTHER = "x"\nDETAILED_PROMPT_WITH_SPECIAL_TOKEN = """{QUESTION}"""\n'
    )
    return base, merged


def write_config(folder, **changes):
    (folder / "model_config.json").write_text(json.dumps(video_config(**changes)))


def hpsv3(folder):
    """Write an HPSv3 checkpoint. Return (folder of the base, its weights by today's names)."""
    base = folder / "base"
    weights = qwen2vl(base, 1)
    generator = torch.Generator().manual_seed(2)
    for at, (out, width) in {0: (1024, 16), 3: (16, 1024), 5: (2, 16)}.items():
        weights[f"rm_head.{at}.weight"] = torch.randn(out, width, generator=generator) * 0.2
        weights[f"rm_head.{at}.bias"] = torch.randn(out, generator=generator) * 0.2
    stored = {key: v.contiguous() for key, v in old_names(weights).items()}
    save_file(stored, folder / "HPSv3.safetensors")
    code = folder / "hpsv3" / "dataset"
    code.mkdir(parents=True)
    (code / "collator.py").write_text(
        'INSTRUCTION = """rate prompt {text_prompt} """\n'
        'prompt_with_special_token = """quality <|Reward|> quality"""\n'
    )
    return base, weights

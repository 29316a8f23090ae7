"""Qwen2-VL with a reward head, as VideoAlign and HPSv3 have it: the head reads the last hidden
states at special tokens of the question.

Both were trained with transformers 4.45, in which the code of their reward models passes embeddings
and no positions to the language model. So all tokens, those of the pictures too, have consecutive
positions, not Qwen2-VL's three-dimensional ones, and the checkpoints expect that. Here the positions
are given explicitly, since later versions of transformers choose others.

T frames, H and W pixels, P patches, L tokens, D width.
"""

import json
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rewards.base import RewardError
from rewards.learned.loading import check_keys, check_trained, place

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's pictures, which Qwen2-VL uses
STD = (0.26862954, 0.26130258, 0.27577711)
FACTOR = 28  # pixels a side of a token of the language model: 2 x 2 patches of 14
MAX_RATIO = 200  # of the sides of a picture
HEAD = "rm_head."


def smart_size(
    size: tuple[int, ...], min_pixels: int, max_pixels: int, factor: int = FACTOR
) -> tuple[int, int]:
    """Return the (height, width) that Qwen2-VL resizes a picture of (height, width) `size` to:
    multiples of `factor`, an area of `min_pixels` to `max_pixels` where that is possible, and about
    the same ratio of sides.

    Source: qwen-vl-utils, `smart_resize`. Raises `RewardError` for sides that differ by more than
    200 times.
    """
    height, width = size
    if max(height, width) > MAX_RATIO * min(height, width):
        raise RewardError(
            f"a frame of {height}x{width} pixels: Qwen2-VL takes sides that differ by at most "
            f"{MAX_RATIO} times"
        )
    sides = [max(factor, round(side / factor) * factor) for side in (height, width)]
    area = sides[0] * sides[1]
    if area > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        sides = [math.floor(side / scale / factor) * factor for side in (height, width)]
    elif area < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        sides = [math.ceil(side * scale / factor) * factor for side in (height, width)]
    return sides[0], sides[1]


def patches(frames: Any, patch: int = 14, merge: int = 2, temporal: int = 2) -> tuple[Any, Any]:
    """Cut frames into the rows that Qwen2-VL's vision tower takes.

    frames: float tensor [T, 3, H, W], pixels from 0 to 255; a single frame stands for `temporal`
    equal ones. Returns (rows float [P, 3 temporal patch²], grid int64 [1, 3]: P = t h w, with the
    number of frames over `temporal` and of the sides over `patch`). `merge` x `merge` neighbours
    follow each other, since the tower merges them into one token.
    """
    import torch

    shape = (1, 3, 1, 1)
    frames = (frames / 255 - torch.tensor(MEAN).view(shape)) / torch.tensor(STD).view(shape)
    if len(frames) == 1:
        frames = frames.expand(temporal, -1, -1, -1)
    count, channels, height, width = frames.shape
    t, h, w = count // temporal, height // patch, width // patch
    cells = frames.reshape(
        t, temporal, channels, h // merge, merge, patch, w // merge, merge, patch
    )
    rows = cells.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return rows.reshape(t * h * w, -1), torch.tensor([[t, h, w]])


def plain_keys(state: Mapping[str, Any], scale: float) -> dict[str, Any]:
    """Return a checkpoint's weights under the names of `transformers.Qwen2VLModel`, with adapters
    folded in and the head under `rm_head.`; those of the language model's output are left out.

    It takes the names before and after version 4.52 of transformers, with or without those of PEFT.
    scale: alpha over rank of the adapters: W + scale B A, computed in float32.
    """
    weights, first, second = {}, {}, {}
    for key, value in state.items():
        key = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
        key = key.replace(".modules_to_save.default.", ".")
        if key.startswith("lm_head.") or ".original_module." in key:
            continue
        key = re.sub(r"^model\.(?=visual\.|language_model\.)", "", key)
        key = re.sub(r"^model\.", "language_model.", key)
        if match := re.fullmatch(r"(.*)\.lora_(A|B)(?:\.default)?\.weight", key):
            (first if match[2] == "A" else second)[f"{match[1]}.weight"] = value
        else:
            weights[key] = value
    for key in first.keys() & second.keys() & weights.keys():
        change = second.pop(key).float() @ first.pop(key).float()
        weights[key] = weights[key].float() + scale * change
    # a half of an adapter, or one without its matrix, stays as a name that no model has
    return weights | {f"{key} (adapter)": value for key, value in (first | second).items()}


class Qwen2VL:
    """Qwen2-VL with a head that reads the hidden states of special tokens.

    what: begins the messages. base: folder with Qwen2-VL's config.json and tokenizer. weights: of
    the whole model by name, `plain_keys`. tokens: the special tokens, in the order in which they
    were added to the tokenizer. make_head: the head for a width D. The head computes in float32,
    the model in `dtype` on `device`. Raises `RewardError` unless the weights are exactly those of
    the model with this tokenizer.
    """

    def __init__(
        self,
        what: str,
        base: pathlib.Path,
        weights: Mapping[str, Any],
        tokens: Sequence[str],
        make_head: Any,
        *,
        device: str = "",
        dtype: str = "",
    ):
        import torch
        import transformers

        self.what, self.torch = what, torch
        self.device, kind = place(device, dtype)
        if self.device == "cpu":
            torch.set_num_threads(1)  # workers run in parallel
        transformers.utils.logging.disable_progress_bar()
        fix = "give the weights of this reward, and the Qwen2-VL model that it was trained from"
        # 1. Tokenizer and configuration.
        try:
            config = transformers.AutoConfig.from_pretrained(base, local_files_only=True)
            tokenizer: Any = transformers.AutoTokenizer.from_pretrained(base, local_files_only=True)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise RewardError(f"{what}: no Qwen2-VL model in {str(base)!r}: {reason}") from error
        if not isinstance(config, transformers.Qwen2VLConfig):
            raise RewardError(f"{what}: {str(base)!r} is a {config.model_type}: {fix}")
        text: Any = config.text_config
        if not tokenizer.chat_template and (base / "chat_template.json").is_file():
            tokenizer.chat_template = json.loads((base / "chat_template.json").read_text())[
                "chat_template"
            ]
        tokenizer.add_tokens(
            [transformers.AddedToken(t, special=True, normalized=False) for t in tokens],
            special_tokens=True,
        )
        self.tokenizer, self.config, self.tokens = tokenizer, config, tuple(tokens)
        self.token_ids = tokenizer.convert_tokens_to_ids(list(tokens))
        text.vocab_size = len(tokenizer)
        # 2. The head.
        head_weights = {
            key.removeprefix(HEAD): value.float()
            for key, value in weights.items()
            if key.startswith(HEAD)
        }
        if not head_weights:
            raise RewardError(f"{what}: the weights have no head ({HEAD}...): {fix}")
        self.head = make_head(text.hidden_size)
        shapes = {key: tuple(value.shape) for key, value in self.head.state_dict().items()}
        check_keys(f"{what}, head", shapes, head_weights, fix)
        check_trained(what, head_weights, fix)
        self.head.load_state_dict(head_weights)
        self.head.to(self.device).eval()
        # 3. The model.
        body = {key: value.to(kind) for key, value in weights.items() if not key.startswith(HEAD)}
        with torch.device("meta"):
            empty = transformers.Qwen2VLModel(config)
        shapes = {key: tuple(value.shape) for key, value in empty.state_dict().items()}
        check_keys(what, shapes, body, f"{fix} (the tokenizer has {len(tokenizer)} tokens)")
        self.model: Any = transformers.Qwen2VLModel.from_pretrained(
            None, config=config, state_dict=body, dtype=kind, attn_implementation="sdpa"
        )
        self.model.to(self.device).eval()

    def tokenise(self, question: str, kind: str, pixels: int) -> list[int]:
        """Return the tokens of a user's message: a video or image, then the question.

        kind: "video" or "image". pixels: number of tokens that stand for it. Raises `RewardError`
        where the prompt in the question contains one of the model's own tokens.
        """
        content = [{"type": kind, kind: ""}, {"type": "text", "text": question}]
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        pad_id = getattr(self.config, f"{kind}_token_id")
        pad = self.tokenizer.convert_ids_to_tokens(pad_id)
        ids = self.tokenizer(text.replace(pad, pad * pixels, 1))["input_ids"]
        if ids.count(pad_id) != pixels or any(ids.count(i) != 1 for i in self.token_ids):
            raise RewardError(
                f"{self.what}: the question must have each of {', '.join(self.tokens)} once and no "
                f"other {pad}; check the prompt and the template: {question[-200:]!r}"
            )
        return ids

    def __call__(self, inputs: Sequence[tuple[Any, str]], kind: str) -> np.ndarray:
        """Return the head's outputs at the special tokens, float32 [B, tokens, outputs].

        inputs: B pairs of frames, a float tensor [T, 3, H, W] with pixels from 0 to 255 whose sides
        are multiples of 28, and the question. kind: "video" or "image". Padding is on the right, so
        no token sees it.
        """
        torch = self.torch
        rows, grids, tokens = [], [], []
        for frames, question in inputs:
            pixels, grid = patches(frames)
            rows.append(pixels)
            grids.append(grid)
            tokens.append(self.tokenise(question, kind, len(pixels) // 4))
        longest = max(map(len, tokens))
        ids = torch.zeros((len(tokens), longest), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for at, row in enumerate(tokens):
            ids[at, : len(row)] = torch.tensor(row)
            mask[at, : len(row)] = 1
        named = "pixel_values_videos" if kind == "video" else "pixel_values"
        with torch.inference_mode():
            hidden = self.model(
                input_ids=ids.to(self.device),
                attention_mask=mask.to(self.device),
                position_ids=torch.arange(longest, device=self.device).expand(3, len(tokens), -1),
                use_cache=False,
                **{
                    named: torch.cat(rows).to(self.device, self.model.dtype),
                    f"{kind}_grid_thw": torch.cat(grids).to(self.device),
                },
            ).last_hidden_state  # [B, L, D]
            where = torch.tensor([[row.index(i) for i in self.token_ids] for row in tokens])
            chosen = hidden[torch.arange(len(tokens))[:, None], where]  # [B, tokens, D]
            return self.head(chosen.float()).cpu().numpy()

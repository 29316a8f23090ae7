"""How well a video shows its prompt, by a CLIP model: the cosine of the prompt's and the frames'
embeddings.

    clip        mean cosine over the frames, -1 to 1 (Radford et al., arXiv 2103.00020; CLIPScore,
                arXiv 2104.08718)
    pickscore   the same by PickScore's CLIP, times its temperature exp(logit_scale), over 26 as in
                Flow-GRPO: about 1
                (Kirstain et al., arXiv 2305.01569)

The model is a folder in the layout of `transformers`, which no longer has CLIP in JAX, so it runs
in PyTorch on the CPU, inside the worker alone: `pip install -e '.[clip]'`. Every worker holds a
copy.
"""

import importlib.util
import pathlib
from typing import Any

import numpy as np

from rewards.base import Asked, RewardError, Score, check_frames
from rewards.ocr.rules import even_frames

KINDS = ("clip", "pickscore")
PICKSCORE = 26.0


def check_model(path: str) -> None:
    """Raises ValueError where the folder or PyTorch is missing."""
    if not (pathlib.Path(path) / "config.json").is_file():
        raise ValueError(
            f"{path!r} is no folder with a CLIP model as transformers writes it (config.json, "
            "weights, tokenizer, preprocessor_config.json)"
        )
    if importlib.util.find_spec("torch") is None:
        raise ValueError("scoring by CLIP needs PyTorch in the workers: pip install -e '.[clip]'")


class ClipReward:
    """Scores against `Asked.prompt`. path: the model's folder; nothing is downloaded."""

    asks_prompt = True

    def __init__(self, path: str, kind: str = "clip", max_frames: int = 9):
        if kind not in KINDS:
            raise ValueError(f"unknown kind {kind!r}: choose one of {', '.join(KINDS)}")
        check_model(path)
        import torch
        import transformers

        # workers run side by side, and the sums are the same on every machine
        torch.set_num_threads(1)
        transformers.utils.logging.disable_progress_bar()
        self.torch, self.kind, self.max_frames = torch, kind, max_frames
        self.model = (
            transformers.CLIPModel.from_pretrained(path, local_files_only=True).float().eval()
        )
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
        # by Pillow where transformers has two, so that machines with and without torchvision agree
        processor = (
            getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
        )
        self.processor = processor.from_pretrained(path, local_files_only=True)

    def score(self, frames: np.ndarray, record: Any) -> Score:
        check_frames(frames)
        if not isinstance(record, Asked):
            raise RewardError(
                f"a CLIP reward needs the prompt, got {record!r}: give rewards.base.Asked"
            )
        chosen = even_frames(len(frames), self.max_frames)
        with self.torch.inference_mode():
            text = self.tokenizer(
                [record.prompt],
                return_tensors="pt",
                truncation=True,
                max_length=self.model.config.text_config.max_position_embeddings,
            )
            pixels = self.processor(images=[frames[i] for i in chosen], return_tensors="pt")[
                "pixel_values"
            ]
            found = self.model(
                input_ids=text["input_ids"],
                attention_mask=text["attention_mask"],
                pixel_values=pixels,
            )
            embeddings = [
                self.torch.nn.functional.normalize(e, dim=-1).double().numpy()
                for e in (found.image_embeds, found.text_embeds)
            ]  # [frames, D], [1, D]
            scale = (
                float(self.model.logit_scale.exp()) / PICKSCORE if self.kind == "pickscore" else 1.0
            )
        values = scale * (embeddings[0] @ embeddings[1][0])  # [frames]
        return Score(float(values.mean()), frames=chosen, frame_values=tuple(map(float, values)))

"""Rewards for how well a video shows its prompt, by a CLIP model: the cosine between the embeddings
of the prompt and of the frames.

    clip        mean cosine over the frames, in [-1, 1] (Radford et al., arXiv 2103.00020; CLIPScore,
                arXiv 2104.08718)
    pickscore   the mean cosine of PickScore's CLIP (Kirstain et al., arXiv 2305.01569) times its
                temperature exp(logit_scale), divided by 26 as in Flow-GRPO: about 1

The model is a folder as `transformers` writes it. `transformers` no longer has CLIP in JAX, so the
model runs in PyTorch on the CPU, in the worker processes alone: `pip install -e '.[clip]'`. Every
worker has a copy. On a GPU, or for several models, it runs in a server of its own:

    python -m rewards.server --name=pick --reward=rewards.clip:ClipReward \\
      --options='{"path": "PickScore_v1", "kind": "pickscore", "device": "cuda"}'
"""

import importlib.util
import pathlib
from typing import Any

import numpy as np

from rewards.base import PromptRecord, RewardError, Score, check_frames
from rewards.learned.loading import check_loaded
from rewards.ocr.rules import even_frames

KINDS = ("clip", "pickscore")
PICKSCORE_SCALE = 26.0  # Flow-GRPO divides PickScore by it


def check_model(path: str) -> None:
    """Raise `ValueError` where the model's folder or PyTorch is missing."""
    if not (pathlib.Path(path) / "config.json").is_file():
        raise ValueError(
            f"{path!r} is not a folder with a CLIP model as transformers writes it (config.json, "
            "weights, tokenizer, preprocessor_config.json)"
        )
    if importlib.util.find_spec("torch") is None:
        raise ValueError("scoring by CLIP needs PyTorch in the workers: pip install -e '.[clip]'")


class ClipReward:
    """The similarity of a video to its prompt. The record must be a `PromptRecord`.

    path: the model's folder; nothing is downloaded. kind: one of `KINDS`. max_frames: number of
    frames that are judged, spread evenly. device: of PyTorch. Raises `RewardError` where the folder
    lacks weights of the model, which transformers would make random.
    """

    needs_prompt = True

    def __init__(self, path: str, kind: str = "clip", max_frames: int = 9, device: str = "cpu"):
        if kind not in KINDS:
            raise ValueError(f"unknown kind {kind!r}: choose one of {', '.join(KINDS)}")
        check_model(path)
        import torch
        import transformers

        # Workers run in parallel; and with one thread, sums are the same on every machine.
        torch.set_num_threads(1)
        transformers.utils.logging.disable_progress_bar()
        self.torch, self.kind, self.max_frames, self.device = torch, kind, max_frames, device
        loaded: Any = transformers.CLIPModel.from_pretrained(
            path, local_files_only=True, output_loading_info=True
        )
        model, info = loaded
        check_loaded(f"the CLIP model in {path!r}", info)
        self.model: Any = model.float().to(device).eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
        # Where transformers has two processors, take the one that uses Pillow, so that machines
        # with and without torchvision agree.
        processor = (
            getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
        )
        self.processor = processor.from_pretrained(path, local_files_only=True)

    def score(self, frames: np.ndarray, record: Any) -> Score:
        """Score a video uint8 [T, H, W, 3] RGB. Raises `RewardError` without a prompt."""
        check_frames(frames)
        if not isinstance(record, PromptRecord):
            raise RewardError(
                f"a CLIP reward needs the prompt, got {record!r}: give rewards.base.PromptRecord"
            )
        indices = even_frames(len(frames), self.max_frames)
        with self.torch.inference_mode():
            tokens = self.tokenizer(
                [record.prompt],
                return_tensors="pt",
                truncation=True,
                max_length=self.model.config.text_config.max_position_embeddings,
            )
            pixels = self.processor(images=[frames[i] for i in indices], return_tensors="pt")[
                "pixel_values"
            ]
            output = self.model(
                input_ids=tokens["input_ids"].to(self.device),
                attention_mask=tokens["attention_mask"].to(self.device),
                pixel_values=pixels.to(self.device),
            )
            image, text = (
                self.torch.nn.functional.normalize(embedding, dim=-1).double().cpu().numpy()
                for embedding in (output.image_embeds, output.text_embeds)
            )  # [frames, D], [1, D]
            scale = 1.0
            if self.kind == "pickscore":
                scale = float(self.model.logit_scale.exp()) / PICKSCORE_SCALE
        values = scale * (image @ text[0])  # [frames]
        return Score(float(values.mean()), frames=indices, frame_values=tuple(map(float, values)))

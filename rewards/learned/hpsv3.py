"""HPSv3: the human preference of the frames of a video, by a Qwen2-VL of 7B (Ma et al., "HPSv3:
Towards Wide-Spectrum Human Preference Score", arXiv 2508.03789; weights: MizzenAI/HPSv3).

    python -m rewards.server --name=hps --reward=rewards.learned.hpsv3:HPSv3 \\
      --options='{"path": "MizzenAI/HPSv3", "template": "HPSv3/hpsv3"}'

The head gives a mean and a deviation; the value is the mean, as in the published inference.py, which
does not normalise it. It judges pictures, so a video is the mean over some of its frames, and motion
does not count.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from rewards.base import PromptRecord, RewardError, Score, check_frames
from rewards.learned import loading
from rewards.learned.qwen2vl import Qwen2VL, plain_keys, smart_size
from rewards.ocr.rules import even_frames

TOKEN = "<|Reward|>"
PIXELS = 256 * 28 * 28  # smallest and largest area of a frame after resizing
CONSTANTS = ("INSTRUCTION", "prompt_with_special_token")
HIDDEN = (1024, 16)  # widths of the head's layers


class HPSv3:
    """The mean preference of evenly spread frames. The record must be a `PromptRecord`.

    path: HPSv3.safetensors, its folder, or a Hugging Face repository. base: Qwen2-VL-7B-Instruct, a
    folder or a repository, of which only configuration and tokenizer are read. template: the folder
    `hpsv3` of the repository MizzenAI/HPSv3, whose question it is, or a text file with
    {text_prompt} and the special token. max_frames: frames that are judged, each a pass.
    """

    needs_prompt = True

    def __init__(
        self,
        path: str,
        template: str,
        base: str = "Qwen/Qwen2-VL-7B-Instruct",
        *,
        max_frames: int = 5,
        device: str = "",
        dtype: str = "",
    ):
        loading.check_packages("HPSv3")
        if max_frames < 1:
            raise RewardError(f"HPSv3: max_frames={max_frames} must be 1 or more")
        self.template = read_template(template)
        self.max_frames = max_frames
        weights = read_weights(loading.find("HPSv3: path", path))
        root = loading.find("HPSv3: base", base)
        self.model = Qwen2VL(
            "HPSv3", root, plain_keys(weights, 1.0), [TOKEN], make_head, device=device, dtype=dtype
        )
        import torch

        self.torch = torch

    def score(self, video: np.ndarray, request: Any) -> Score:
        """Score a video uint8 [T, H, W, 3] RGB; an image has T = 1."""
        return self.score_batch([video], [request])[0]

    def score_batch(self, videos: Sequence[np.ndarray], requests: Sequence[Any]) -> list[Score]:
        """Score B videos in one pass. Raises `RewardError` without a prompt."""
        inputs, chosen = [], []
        for video, request in zip(videos, requests):
            check_frames(video)
            if not isinstance(request, PromptRecord):
                raise RewardError(f"HPSv3 needs the prompt, got {request!r}")
            question = self.template.replace("{text_prompt}", request.prompt)
            # one frame would be the first alone
            indices = (
                even_frames(len(video), self.max_frames)
                if self.max_frames > 1
                else (len(video) // 2,)
            )
            chosen.append(indices)
            inputs += [(self._picture(video[i]), question) for i in indices]
        values = iter(self.model(inputs, "image")[:, 0, 0].tolist())
        scores = []
        for indices in chosen:
            own = tuple(next(values) for _ in indices)
            scores.append(Score(float(np.mean(own)), frames=indices, frame_values=own))
        return scores

    def _picture(self, frame: np.ndarray) -> Any:
        """Return a frame at the model's size, float [1, 3, H, W]; cubic, as Pillow resizes."""
        height, width = smart_size(frame.shape[:2], PIXELS, PIXELS)
        picture = Image.fromarray(np.ascontiguousarray(frame)).resize(
            (width, height), Image.Resampling.BICUBIC
        )
        return self.torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float()


def make_head(width: int) -> Any:
    """Return the published head: three layers with ReLU, from D to the mean and the deviation."""
    from torch import nn

    first, second = HIDDEN
    return nn.Sequential(
        nn.Linear(width, first),
        nn.ReLU(),
        nn.Dropout(0.05),
        nn.Linear(first, second),
        nn.ReLU(),
        nn.Linear(second, 2),
    )


def read_template(template: str) -> str:
    """Return the question with the place {text_prompt} for the prompt. Raises `RewardError`."""
    path = loading.find("HPSv3: template", template)
    if path.is_dir() or path.suffix == ".py":
        text = "".join(
            loading.read_constants("HPSv3: template", path, CONSTANTS)[n] for n in CONSTANTS
        )
    else:
        text = path.read_text(encoding="utf-8")
    missing = [mark for mark in ("{text_prompt}", TOKEN) if text.count(mark) != 1]
    if missing:
        raise RewardError(f"HPSv3: template={template!r} must have {missing[0]} once")
    return text


def read_weights(path: pathlib.Path) -> dict[str, Any]:
    """Return the weights of a file, or of the .safetensors files of a folder."""
    return (
        loading.read_tensors(path) if path.is_file() else loading.read_folder("HPSv3: path", path)
    )

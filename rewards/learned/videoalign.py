"""VideoAlign's VideoReward: visual quality (VQ), motion quality (MQ) and text alignment (TA) of a
video, by a Qwen2-VL of 2B (Liu et al., "Improving Video Generation with Human Feedback",
arXiv 2501.13918; weights: KwaiVGI/VideoReward).

    python -m rewards.server --name=va --reward=rewards.learned.videoalign:VideoAlign \\
      --options='{"path": "VideoAlign/checkpoints"}'

Each part is (raw - mean) / std with the means and deviations of the checkpoint's own
model_config.json, as in VideoAlign's inference.py; the value is their sum, there "Overall". Frames,
sizes and the question are those of its inference.py, vision_process.py and prompt_template.py. Three
things differ: adapters are folded into the weights, the head computes in float32, without which
values of one group coincide, and frames do not pass through a video file.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rewards.base import PromptRecord, RewardError, check_frames
from rewards.learned import loading
from rewards.learned.qwen2vl import Qwen2VL, plain_keys, smart_size

PARTS = ("VQ", "MQ", "TA")
TOKENS = tuple(f"<|{part}_reward|>" for part in PARTS)
TEMPLATE_FILE, TEMPLATE = "prompt_template.py", "DETAILED_PROMPT_WITH_SPECIAL_TOKEN"
MIN_PIXELS = 128 * 28 * 28  # of a frame after resizing
MIN_FRAMES, MAX_FRAMES, EVEN = 4, 768, 2  # of a video; the number of frames is even
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
_FIX = "give the folder of KwaiVGI/VideoReward, with model_config.json and checkpoint-N"


def frame_indices(frames: int, fps: float, sample_fps: float) -> tuple[int, ...]:
    """Return the frames of a video that the model sees: `sample_fps` per second, at least 4, an
    even number, evenly spread from the first to the last.

    Raises `RewardError` for a single frame.
    """
    if frames < EVEN:
        raise RewardError(f"VideoAlign scores videos of {EVEN} frames or more, got {frames}")
    most = min(MAX_FRAMES, frames) // EVEN * EVEN
    count = min(max(frames / fps * sample_fps, MIN_FRAMES), most)
    count = min(round(count / EVEN) * EVEN, frames)
    return tuple(int(i) for i in np.linspace(0, frames - 1, count).round())


class VideoAlign:
    """VQ, MQ and TA of a video, normalised, as three parts. The record must be a `PromptRecord`.

    path: folder with model_config.json and checkpoint-N, or a Hugging Face repository. base: the
    Qwen2-VL it was trained from, a folder or a repository; "" takes the one that model_config.json
    names. Only its configuration and tokenizer are read, unless the checkpoint is an adapter.
    template: VideoAlign's prompt_template.py, its folder, or a text file with {text_prompt} and the
    three special tokens; "" looks in `path` and the folder above. sample_fps: frames per second
    that are judged; None takes the checkpoint's. grey_motion: judge MQ on the video without
    colours, so that colours do not raise it, by a second pass.
    """

    needs_prompt = True

    def __init__(
        self,
        path: str,
        base: str = "",
        template: str = "",
        *,
        sample_fps: float | None = None,
        grey_motion: bool = False,
        device: str = "",
        dtype: str = "",
    ):
        loading.check_packages("VideoAlign")
        folder = loading.find("VideoAlign: path", path)
        data, model, adapters, norm = read_config(folder)
        self.template = read_template(template, folder)
        self.max_pixels, self.norm = int(data["max_frame_pixels"]), norm
        self.sample_fps = float(data["fps"] if sample_fps is None else sample_fps)
        if not self.sample_fps > 0:
            raise RewardError(f"VideoAlign: sample_fps={self.sample_fps} must be above 0")
        self.grey_motion, self.diagonal = grey_motion, model["output_dim"] == len(PARTS)
        root = loading.find("VideoAlign: base", base or model["model_name_or_path"])
        scale = adapters["lora_alpha"] / (
            adapters["lora_r"] ** (0.5 if adapters.get("use_rslora") else 1)
        )
        weights = plain_keys(read_weights(folder, root), scale)
        import torch

        self.torch = torch
        self.model = Qwen2VL(
            "VideoAlign",
            root,
            weights,
            TOKENS,
            lambda width: torch.nn.Linear(width, model["output_dim"], bias=False),
            device=device,
            dtype=dtype,
        )

    def score(self, video: np.ndarray, request: Any) -> dict[str, float]:
        """Score a video uint8 [T, H, W, 3] RGB, T of 2 or more."""
        return self.score_batch([video], [request])[0]

    def score_batch(
        self, videos: Sequence[np.ndarray], requests: Sequence[Any]
    ) -> list[dict[str, float]]:
        """Score B videos in one pass. Raises `RewardError` without a prompt."""
        inputs = [self._input(video, request) for video, request in zip(videos, requests)]
        raw = self._raw(inputs)
        if self.grey_motion:
            luma = self.torch.tensor(LUMA).view(1, 3, 1, 1)
            grey = [
                ((f * luma).sum(1, keepdim=True).round().expand(-1, 3, -1, -1), question)
                for f, question in inputs
            ]
            raw[:, 1] = self._raw(grey)[:, 1]
        return [self._normalised(row) for row in raw]

    def _raw(self, inputs: Sequence[tuple[Any, str]]) -> np.ndarray:
        """Return the raw parts, float32 [B, 3]: each token's output, or of three its own."""
        outputs = self.model(inputs, "video")  # [B, 3, 1 or 3]
        return np.diagonal(outputs, axis1=1, axis2=2).copy() if self.diagonal else outputs[..., 0]

    def _normalised(self, raw: np.ndarray) -> dict[str, float]:
        return {
            part: (float(value) - self.norm[f"{part}_mean"]) / self.norm[f"{part}_std"]
            for part, value in zip(PARTS, raw)
        }

    def _input(self, video: np.ndarray, request: Any) -> tuple[Any, str]:
        """Return the resized frames, float [T, 3, H, W], and the question."""
        check_frames(video)
        if not isinstance(request, PromptRecord):
            raise RewardError(f"VideoAlign needs the prompt, got {request!r}")
        indices = frame_indices(len(video), request.fps, self.sample_fps)
        frames = self.torch.from_numpy(np.ascontiguousarray(video[list(indices)]))
        # as torchvision resizes uint8: cubic with antialiasing, then rounded
        frames = self.torch.nn.functional.interpolate(
            frames.permute(0, 3, 1, 2).float(),
            size=smart_size(video.shape[1:3], MIN_PIXELS, self.max_pixels),
            mode="bicubic",
            antialias=True,
        )
        question = self.template.replace("{text_prompt}", request.prompt)
        return frames.clamp(0, 255).round(), question


# --- Files ----------------------------------------------------------------------------------------


def read_config(folder: pathlib.Path) -> tuple[Mapping, Mapping, Mapping, Mapping]:
    """Return the sections data, model, adapters and normalisation of model_config.json. Raises
    `RewardError` for one that this module cannot follow.
    """
    file = folder / "model_config.json"
    names = ("data_config", "model_config", "peft_lora_config", "inference_config")
    try:
        config = json.loads(file.read_text())
        data, model, adapters, norm = (config[name] for name in names)
        norm = {
            f"{part}_{n}": float(norm[f"{part}_{n}"]) for part in PARTS for n in ("mean", "std")
        }
        expected = {
            "data_config.prompt_template_type": (
                data["prompt_template_type"],
                ("detailed_special",),
            ),
            "data_config.sample_type": (data.get("sample_type", "uniform"), ("uniform",)),
            "data_config.num_frames": (data.get("num_frames"), (None,)),
            "model_config.use_special_tokens": (model["use_special_tokens"], (True,)),
            "model_config.output_dim": (model["output_dim"], (1, len(PARTS))),
        }
        _ = (data["fps"], data["max_frame_pixels"], adapters["lora_r"], adapters["lora_alpha"])
    except (OSError, ValueError) as error:
        raise RewardError(f"VideoAlign: {file} cannot be read ({error}): {_FIX}") from error
    except (KeyError, TypeError) as error:
        raise RewardError(f"VideoAlign: {file} has no {error}: {_FIX}") from error
    for key, (value, allowed) in expected.items():
        if value not in allowed:
            raise RewardError(
                f"VideoAlign: {key}={value!r} of {file} must be one of {allowed}: {_FIX}"
            )
    return data, model, adapters, norm


def read_template(template: str, folder: pathlib.Path) -> str:
    """Return the question with the place {text_prompt} for the prompt. Raises `RewardError`."""
    if template:
        path = loading.find("VideoAlign: template", template)
    else:
        places = [folder, folder.resolve().parent]
        path = next((p / TEMPLATE_FILE for p in places if (p / TEMPLATE_FILE).is_file()), None)
        if path is None:
            raise RewardError(
                f"VideoAlign: template: there is no {TEMPLATE_FILE} in {' or '.join(map(str, places))}: "
                "give the one of the repository KwaiVGI/VideoAlign"
            )
    if path.is_dir() or path.suffix == ".py":
        text = loading.read_constants("VideoAlign: template", path, [TEMPLATE])[TEMPLATE]
    else:
        text = path.read_text(encoding="utf-8")
    missing = [mark for mark in ("{text_prompt}", *TOKENS) if text.count(mark) != 1]
    if missing:
        raise RewardError(f"VideoAlign: template={str(path)!r} must have {missing[0]} once")
    return text


def read_weights(folder: pathlib.Path, base: pathlib.Path) -> dict[str, Any]:
    """Return the weights of the latest checkpoint-N: model.pth, or the adapter and what was trained
    beside it over those of the base model.
    """
    steps = sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]))
    place = steps[-1] if steps else folder
    whole, adapter = place / "model.pth", place / "adapter_model.safetensors"
    trained = place / "non_lora_state_dict.pth"
    if whole.is_file():
        return loading.read_tensors(whole)
    if not (adapter.is_file() and trained.is_file()):
        raise RewardError(
            f"VideoAlign: {place} has neither model.pth nor {adapter.name} with {trained.name}: {_FIX}"
        )
    beside = loading.read_tensors(trained)
    if not any("embed_tokens" in key for key in beside):
        raise RewardError(
            f"VideoAlign: {trained} lacks the embeddings of the special tokens, which would be "
            f"random: {_FIX}"
        )
    body = plain_keys(loading.read_folder("VideoAlign: base", base), 1.0)
    return body | plain_keys(beside, 1.0) | _adapters(loading.read_tensors(adapter))


def _adapters(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return adapters under the names of the matrices that `plain_keys` gives."""
    named = {}
    for key, value in state.items():
        matrix, kind, rest = key.partition(".lora_")
        (name,) = plain_keys({f"{matrix}.weight": value}, 1.0)
        named[f"{name.removesuffix('.weight')}{kind}{rest}"] = value
    return named

"""A vision-language model in this process, for questions about frames."""

from typing import Any

import numpy as np
from PIL import Image

from rewards.base import RewardError
from rewards.learned import loading

MAX_TOKENS = 512  # of an answer


class LocalModel:
    """A model of transformers for images and text, which answers without sampling.

    path: its folder, or a Hugging Face repository. device, dtype: "" chooses, see `loading.place`.
    max_tokens: of an answer; a longer one has failed. Raises `RewardError` where the model lacks
    weights, or is none for images.
    """

    def __init__(
        self, path: str, *, device: str = "", dtype: str = "", max_tokens: int = MAX_TOKENS
    ):
        loading.check_packages("a model for questions")
        folder = loading.find("Question: path", path)
        import torch
        import transformers

        self.torch, self.max_tokens = torch, max_tokens
        self.device, kind = loading.place(device, dtype)
        if self.device == "cpu":
            torch.set_num_threads(1)  # workers run in parallel
        transformers.utils.logging.disable_progress_bar()
        try:
            self.processor: Any = transformers.AutoProcessor.from_pretrained(
                folder, local_files_only=True
            )
            loaded: Any = transformers.AutoModelForImageTextToText.from_pretrained(
                folder, local_files_only=True, dtype=kind, output_loading_info=True
            )
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = " ".join(str(error).split())[:300]
            raise RewardError(
                f"Question: path={path!r} cannot be loaded as a model for images and text ({reason}): "
                "give the folder of one, with its processor and weights"
            ) from error
        model, info = loaded
        loading.check_loaded(f"Question: path={path!r}", info)
        self.model = model.to(self.device).eval()

    def ask(self, question: str, frames: np.ndarray) -> str:
        """Return the model's answer to a question about frames uint8 [T, H, W, 3] RGB. Raises
        `RewardError` when it is not complete.
        """
        content: list[dict[str, Any]] = [
            {"type": "image", "image": Image.fromarray(np.ascontiguousarray(f))} for f in frames
        ]
        content.append({"type": "text", "text": question})
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self.device)
        for key, value in inputs.items():
            if self.torch.is_floating_point(value):
                inputs[key] = value.to(self.model.dtype)
        with self.torch.inference_mode():
            output = self.model.generate(**inputs, do_sample=False, max_new_tokens=self.max_tokens)
        answer = output[0, inputs["input_ids"].shape[1] :]
        ends = self.model.generation_config.eos_token_id
        if len(answer) == self.max_tokens and int(answer[-1]) not in np.atleast_1d(ends or -1):
            raise RewardError(f"the model gave no complete answer of {self.max_tokens} tokens")
        return self.processor.decode(answer, skip_special_tokens=True).strip()

    def close(self) -> None:
        """Nothing has to be ended."""

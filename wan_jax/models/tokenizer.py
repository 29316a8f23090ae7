"""Cleaning and tokenisation of prompts, as in Diffusers' `WanPipeline`.

The tokenizer is the checkpoint's own `tokenizer/` folder, read by the class that `model_index.json`
names (transformers' `T5TokenizerFast`; 4.51 to 5.x). Nothing is fetched from the network.
"""

import html
import os
import pathlib
import re
import warnings
from collections.abc import Sequence

import ftfy
import numpy as np
from jaxtyping import Int32

from wan_jax.errors import UserError


class TokenizerError(UserError, ValueError):
    """A tokenizer folder that cannot be used."""


def clean(prompt: str) -> str:
    """Return the text that is tokenised: `ftfy.fix_text`, HTML unescaped twice, runs of whitespace
    as one space.

    Diffusers skips ftfy without a warning if it is not installed, and then the token ids differ:
    ftfy makes curly quotes straight (“SALE” to "SALE"), full-width characters ASCII (， to ,) and
    splits ligatures (ﬁ to fi). Wan's own code always runs it, so it is a dependency here.
    """
    text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", text.strip()).strip()


class Tokenizer:
    """Converts raw prompts to ids and masks; it cleans the prompts itself."""

    def __init__(self, backend):
        self._backend = backend

    @classmethod
    def load(cls, path) -> "Tokenizer":
        """Read the `tokenizer` folder of a checkpoint. Raises `TokenizerError` when it is missing
        or unreadable.
        """
        path = pathlib.Path(path)
        # Checked here, because transformers treats a missing folder as a name on the Hub, and from
        # 5.0 on reads a folder without a vocabulary as a tokenizer of a few special tokens.
        if not path.is_dir():
            raise TokenizerError(
                f"{path} is not a folder: give the 'tokenizer' folder of a Wan checkpoint"
            )
        vocabularies = ("tokenizer.json", "spiece.model")
        if not any((path / name).is_file() for name in vocabularies):
            raise TokenizerError(
                f"{path} has no {' or '.join(vocabularies)}: the download is incomplete, "
                "fetch the checkpoint's 'tokenizer' folder again"
            )
        # else it warns that PyTorch is missing
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        # takes seconds to import; its lazy module is opaque to pyright
        from transformers import T5TokenizerFast  # pyright: ignore[reportAttributeAccessIssue]

        try:
            backend = T5TokenizerFast.from_pretrained(str(path), local_files_only=True)
        # Broad: for damaged files the readers raise KeyError, OSError, `Exception` itself and more.
        except Exception as error:
            raise TokenizerError(
                f"{path} cannot be read as a T5 tokenizer ({type(error).__name__}: {error}): files "
                "may be truncated, or Git LFS pointers without their content"
            ) from error
        for name in ("pad_token_id", "eos_token_id"):
            if getattr(backend, name) is None:
                raise TokenizerError(
                    f"{path}: tokenizer has no {name}, tokenizer_config.json may be damaged"
                )
        if (end := backend("").input_ids) != [backend.eos_token_id]:
            raise TokenizerError(
                f"{path}: an empty prompt gives the ids {end}, expected only the end token "
                f"[{backend.eos_token_id}]: not a UMT5 tokenizer"
            )
        return cls(backend)

    @property
    def vocab_size(self) -> int:
        """Number of ids with added tokens; at most the rows of the text encoder's embedding."""
        return len(self._backend)

    def lengths(self, prompts: Sequence[str]) -> list[int]:
        """Return the number of tokens of each prompt before truncation, with the end token."""
        cleaned = self._clean(prompts)
        return [len(ids) for ids in self._tokens(cleaned).input_ids] if cleaned else []

    def __call__(
        self, prompts: Sequence[str], length: int
    ) -> tuple[Int32[np.ndarray, "B length"], Int32[np.ndarray, "B length"]]:
        """Return ids and mask of B prompts; the mask is 1 on tokens, with the end token.

        Padded on the right with the pad id. A prompt that is too long is truncated before its end
        token, with a warning, because the text to be rendered may be in the part that is lost.
        """
        if length < 1:
            raise ValueError(
                f"length={length}: at least 1 token is needed, for the end token (Wan uses 512)"
            )
        cleaned = self._clean(prompts)
        if not cleaned:
            return np.zeros((0, length), np.int32), np.zeros((0, length), np.int32)
        for prompt, tokens in zip(cleaned, self._tokens(cleaned).input_ids):
            if len(tokens) > length:
                warnings.warn(
                    f"prompt of {len(tokens)} tokens cut to {length}, the rest is lost, text to be "
                    f"rendered included; shorten it or raise the length: {prompt!r}",
                    stacklevel=2,
                )
        out = self._tokens(cleaned, padding="max_length", truncation=True, max_length=length)
        return np.asarray(out.input_ids, np.int32), np.asarray(out.attention_mask, np.int32)

    def _clean(self, prompts: Sequence[str]) -> list[str]:
        if isinstance(prompts, str):
            raise TypeError(f"prompts is one string ({prompts!r}): give a list of prompts")
        return [clean(prompt) for prompt in prompts]

    def _tokens(self, cleaned: list[str], **options):
        # padding and truncation are always given, because a fast tokenizer remembers those of its
        # previous call or of its file
        options = {"padding": False, "truncation": False, **options}
        return self._backend(cleaned, return_attention_mask=True, verbose=False, **options)

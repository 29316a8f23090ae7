"""Cleaning and tokenisation of prompts, as in Wan's own code and Diffusers' `WanPipeline`.

The tokenizer is the checkpoint's own `tokenizer/` folder. Its tokenizer.json is read as it is by the
`tokenizers` library, so ids do not depend on the version of transformers: transformers 5 rebuilds
the tokenizer with 2 as the id of unknown characters, where UMT5's is 3. Nothing is fetched from the
network.
"""

import html
import json
import os
import pathlib
import re
import warnings
from collections.abc import Sequence

import ftfy
import numpy as np
import tokenizers
from jaxtyping import Int32

from wan_jax.errors import UserError

VERSION = 2  # of the ids of a text: what was computed from them by another version is out of date
# T5's names, which apply where the folder's configuration gives no others.
SPECIAL_TOKENS = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
SPECIAL_FILES = ("tokenizer_config.json", "special_tokens_map.json")


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

    def __init__(self, backend: tokenizers.Tokenizer, pad: int, end: int):
        """backend: without padding and truncation; pad, end: ids of these tokens."""
        self._backend = backend
        self.pad = pad
        self.end = end

    @classmethod
    def load(cls, path) -> "Tokenizer":
        """Read the `tokenizer` folder of a checkpoint: tokenizer.json, or spiece.model where there is
        none. Raises `TokenizerError` when it is missing or unreadable.
        """
        path = pathlib.Path(path)
        if not path.is_dir():
            raise TokenizerError(
                f"{path} is not a folder: give the 'tokenizer' folder of a Wan checkpoint"
            )
        readers = {"tokenizer.json": tokenizers.Tokenizer.from_file, "spiece.model": _from_pieces}
        found = next((name for name in readers if (path / name).is_file()), None)
        if found is None:
            raise TokenizerError(
                f"{path} has no {' or '.join(readers)}: the download is incomplete, "
                "fetch the checkpoint's 'tokenizer' folder again"
            )
        try:
            names = _special_tokens(path)
            backend = readers[found](str(path / found))
        # Broad: for damaged files the readers raise KeyError, OSError, `Exception` itself and more.
        except Exception as error:
            raise TokenizerError(
                f"{path} cannot be read as a T5 tokenizer ({type(error).__name__}: {error}): files "
                "may be truncated, or Git LFS pointers without their content"
            ) from error
        # the file may have settings of its own
        backend.no_padding()
        backend.no_truncation()
        ids: dict[str, int] = {}
        for name, token in names.items():
            if (number := backend.token_to_id(token)) is None:
                raise TokenizerError(
                    f"{path}: {found} has no {token!r}, which is its {name}: "
                    f"{' or '.join(SPECIAL_FILES)} may be damaged"
                )
            ids[name] = number
        if (end := backend.encode("").ids) != [ids["eos_token"]]:
            raise TokenizerError(
                f"{path}: an empty prompt gives the ids {end}, expected only the end token "
                f"[{ids['eos_token']}]: not a UMT5 tokenizer"
            )
        return cls(backend, ids["pad_token"], ids["eos_token"])

    @property
    def vocab_size(self) -> int:
        """Number of ids with added tokens; at most the rows of the text encoder's embedding."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def lengths(self, prompts: Sequence[str]) -> list[int]:
        """Return the number of tokens of each prompt before truncation, with the end token."""
        return [len(ids) for ids in self._tokens(self._clean(prompts))]

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
        ids = np.full((len(cleaned), length), self.pad, np.int32)
        mask = np.zeros((len(cleaned), length), np.int32)
        for row, (prompt, tokens) in enumerate(zip(cleaned, self._tokens(cleaned))):
            if len(tokens) > length:
                warnings.warn(
                    f"prompt of {len(tokens)} tokens cut to {length}, the rest is lost, text to be "
                    f"rendered included; shorten it or raise the length: {prompt!r}",
                    stacklevel=2,
                )
                tokens = [*tokens[: length - 1], self.end]
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = 1
        return ids, mask

    def _clean(self, prompts: Sequence[str]) -> list[str]:
        if isinstance(prompts, str):
            raise TypeError(f"prompts is one string ({prompts!r}): give a list of prompts")
        return [clean(prompt) for prompt in prompts]

    def _tokens(self, cleaned: list[str]) -> list[list[int]]:
        """Return the ids of each text, with the end token."""
        return [encoding.ids for encoding in self._backend.encode_batch(cleaned)]


def _special_tokens(path: pathlib.Path) -> dict[str, str]:
    """Return the names of the special tokens of a tokenizer folder. Raises ValueError."""
    names = dict(SPECIAL_TOKENS)
    for file in reversed(SPECIAL_FILES):  # the first one decides
        if not (path / file).is_file():
            continue
        values = json.loads((path / file).read_text(encoding="utf-8"))
        for name in names:
            value = values.get(name)
            value = value.get("content") if isinstance(value, dict) else value
            names[name] = names[name] if value is None else value
    return names


def _from_pieces(path: str) -> tokenizers.Tokenizer:
    """Read a spiece.model by transformers' conversion, and repair its id of unknown characters."""
    # else it warns that PyTorch is missing
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    # takes seconds to import; its lazy module is opaque to pyright
    from transformers import T5TokenizerFast  # pyright: ignore[reportAttributeAccessIssue]

    folder = os.path.dirname(path)
    converted = T5TokenizerFast.from_pretrained(folder, local_files_only=True)
    content = json.loads(converted.backend_tokenizer.to_str())
    pieces = [piece for piece, _ in content["model"]["vocab"]]
    content["model"]["unk_id"] = pieces.index(converted.unk_token)
    return tokenizers.Tokenizer.from_str(json.dumps(content))

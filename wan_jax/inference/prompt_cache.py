"""Text embeddings on disk: the prompts are encoded once for a model, however many runs use them.

    MODEL/text_cache/<key>.npy  [rows of the prompt, text_dim], without the zero rows after them, in
                                the encoder's dtype (bfloat16 as its bits in uint16, because NumPy
                                has no name for it), followed by the CRC-32 of all that, 4 bytes

The key is a hash of the model's manifest, the version of the tokenisation, the encoder's dtype and
the prompt. The cache is in the
model's folder, so it is deleted with it. If the folder cannot be written, the next run computes the
embeddings again.
"""

import contextlib
import hashlib
import io
import os
import pathlib
import zlib

import numpy as np

from wan_jax.models import tokenizer
from wan_jax.storage.model_dir import MANIFEST, ModelDir

FOLDER = "text_cache"


class PromptCache:
    """Reads and writes embeddings by prompt; dtype: that of the encoder."""

    def __init__(self, model: ModelDir, dtype):
        self.folder = model.path / FOLDER
        self.dtype = np.dtype(dtype)
        self.stored = (
            self.dtype if self.dtype.isbuiltin == 1 else np.dtype(f"u{self.dtype.itemsize}")
        )
        self.salt = hashlib.sha256(
            (model.path / MANIFEST).read_bytes()
            + f"{self.dtype} rows, crc32, tokens {tokenizer.VERSION}".encode()
        ).digest()
        self.writable = True

    def path(self, prompt: str) -> pathlib.Path:
        """Return the file of a prompt."""
        return self.folder / f"{hashlib.sha256(self.salt + prompt.encode()).hexdigest()}.npy"

    def get(self, prompt: str) -> np.ndarray | None:
        """Return the embedding of a prompt [rows, text_dim], or None if there is none or it is
        damaged.
        """
        rows = self._load(prompt)
        return None if rows is None else rows.view(self.dtype)

    def rows(self, prompt: str) -> int | None:
        """Return the number of rows that `get` returns, or None."""
        rows = self._load(prompt)
        return None if rows is None else len(rows)

    def _load(self, prompt: str) -> np.ndarray | None:
        try:
            content = self.path(prompt).read_bytes()
            if zlib.crc32(content[:-4]) != int.from_bytes(content[-4:], "little"):
                return None
            rows = np.load(io.BytesIO(content[:-4]))
        except (OSError, ValueError, EOFError):
            return None
        return rows if rows.dtype == self.stored else None

    def put(self, prompt: str, rows: np.ndarray) -> None:
        """Write the embedding of a prompt, as a complete file or not at all."""
        if not self.writable:
            return
        path = self.path(prompt)
        partial = path.with_suffix(f".{os.getpid()}")
        try:
            self.folder.mkdir(exist_ok=True)
            content = io.BytesIO()
            np.save(content, rows.view(self.stored))
            partial.write_bytes(
                content.getvalue() + zlib.crc32(content.getvalue()).to_bytes(4, "little")
            )
            partial.replace(path)
        except OSError:
            self.writable = False
            with contextlib.suppress(OSError):
                partial.unlink()

"""Text embeddings on disk: a prompt set is encoded once for a model, however many runs use it.

    MODEL/text_cache/<key>.npy   [rows of the prompt, text_dim] without the zero rows after them, in
                                 the encoder's
                                 type; bfloat16, which NumPy's files cannot name, as its bits in
                                 uint16; then the CRC-32 of all that, 4 bytes

The key is a hash of the model's manifest, the encoder's dtype and the prompt. The cache lies in the
model's folder and goes with it. A folder that cannot be written is no error: the embeddings are
then computed again by the next run.
"""

import contextlib
import hashlib
import io
import os
import pathlib
import zlib

import numpy as np

from wan_jax.storage.model_dir import MANIFEST, ModelDir

FOLDER = "text_cache"


class PromptCache:
    """`get` and `put` embeddings by prompt."""

    def __init__(self, model: ModelDir, dtype):
        self.folder = model.path / FOLDER
        self.dtype = np.dtype(dtype)
        self.stored = (
            self.dtype if self.dtype.isbuiltin == 1 else np.dtype(f"u{self.dtype.itemsize}")
        )
        self.salt = hashlib.sha256(
            (model.path / MANIFEST).read_bytes() + f"{self.dtype} rows, crc32".encode()
        ).digest()
        self.writable = True

    def path(self, prompt: str) -> pathlib.Path:
        return self.folder / f"{hashlib.sha256(self.salt + prompt.encode()).hexdigest()}.npy"

    def get(self, prompt: str) -> np.ndarray | None:
        """The prompt's rows, or None. A damaged file counts as none."""
        rows = self._load(prompt)
        return None if rows is None else rows.view(self.dtype)

    def rows(self, prompt: str) -> int | None:
        """How many `get` returns, or None."""
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
        """Writes the file whole or not at all."""
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

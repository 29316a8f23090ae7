"""Tokenises prompts on the device, as the tokenizer of `examples/tiny_wan/tokenizer.py` does."""

import jax.numpy as jnp
import numpy as np

from examples.tiny_wan.tokenizer import EOS as EOS_TOKEN
from examples.tiny_wan.tokenizer import SPACE, UNK, VOCABULARY

EOS = VOCABULARY.index(EOS_TOKEN)
ASCII_IDS = np.array(
    [
        VOCABULARY.index(c if c in VOCABULARY else SPACE if c == " " else UNK)
        for c in map(chr, range(128))
    ],
    np.int32,
)


def frame_text(chars):
    """Add the space that the tokenizer puts before a prompt, and room for EOS.

    uint8 ASCII codes [B, R] -> [B, R + 2].
    """
    first = jnp.where(chars[:, :1] > 0, ord(" "), 0).astype(chars.dtype)
    return jnp.concatenate([first, chars, jnp.zeros_like(first)], axis=1)


def tokenise(chars):
    """Tokenise as `examples/tiny_wan/tokenizer.py` does, inside `jit`.

    ASCII codes [B, R], 0 past the end -> ids and mask [B, R + 2].
    """
    chars = frame_text(chars)
    length = (chars > 0).sum(1, keepdims=True)
    at = jnp.arange(chars.shape[1])
    ids = jnp.where(at == length, EOS, jnp.asarray(ASCII_IDS)[chars])
    mask = at <= length
    return jnp.where(mask, ids, 0), mask

"""Folders of data with random latents, without a model."""

import pathlib
import types

import numpy as np

from grpo.data.latent_folder import Kind, LatentData, Writer, open_data

MODEL = types.SimpleNamespace(manifest={}, path="model")  # of a version without digests


def write_data(
    folder: pathlib.Path,
    shape,
    *,
    height: int,
    width: int,
    items: int = 5,
    text_dim: int = 12,
    prompts: int = 0,
) -> tuple[LatentData, np.ndarray, list[np.ndarray]]:
    """Write random latents of this shape, of pictures of this size, with random embeddings of 2 to 5
    rows, in two shards. Returns the data, the latents and the embeddings.

    prompts: number of different ones, with one embedding each, which the items have in turn; 0: each
    item has its own.
    """
    rng = np.random.default_rng(0)
    folder.mkdir()
    writer = Writer(folder, Kind(None, height, width, 1, None, "float32", "files"))
    latents = rng.standard_normal((items, *shape)).astype(np.float32)
    prompts = prompts or items
    texts = [rng.standard_normal((2 + i % 4, text_dim)).astype(np.float32) for i in range(prompts)]
    texts = [texts[i % prompts] for i in range(items)]
    keys = [(f"{i}.png", str(i), f"prompt {i % prompts}") for i in range(items)]
    writer.add(keys[:2], latents[:2], texts[:2])
    writer.add(keys[2:], latents[2:], texts[2:])
    return open_data(folder, MODEL), latents, texts

"""Embeddings of prompts on disk."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wan_jax.inference import pipeline
from wan_jax.inference.prompt_cache import PromptCache
from wan_jax.models import tokenizer
from wan_jax.models.tokenizer import Tokenizer
from wan_jax.storage import integrity, model_dir

PROMPTS = ('A red sign with the word "open".', "Someone wrote “it's late” on a  wall.")


@pytest.mark.slow
def test_embeddings_are_cached_by_model_and_prompt(folders, tmp_path, monkeypatch):
    folder = shutil.copytree(folders[1], tmp_path / "model")
    model, prompts = model_dir.open_model(folder), [*PROMPTS, PROMPTS[0], "a " * 40]
    plain = pipeline.embed_prompts(model, prompts, "ugly")
    first = pipeline.embed_prompts(model, prompts, "ugly", cache=True)
    assert len(list((folder / "text_cache").glob("*.npy"))) == 4
    load, loaded = model_dir.build, []
    monkeypatch.setattr(
        model_dir, "build", lambda *args, **kwargs: loaded.append(args[0]) or load(*args, **kwargs)
    )
    read = Tokenizer.load
    monkeypatch.setattr(Tokenizer, "load", lambda path: loaded.append("tokenizer") or read(path))
    again = pipeline.embed_prompts(model, prompts, "ugly", cache=True)
    assert pipeline.text_rows(model, prompts, "ugly") == plain.rows
    assert not loaded  # nothing was missing, so neither encoder nor tokenizer was even read
    assert (
        pipeline.text_rows(model, [*prompts, "b " * 70], "ugly")
        == pipeline.round_up_rows(len("b " * 70))
        > plain.rows
    )
    assert loaded == ["tokenizer"]
    loaded.clear()
    for table in (first, again):
        np.testing.assert_array_equal(table.padded(table.prompts), plain.padded(plain.prompts))
        np.testing.assert_array_equal(table.negative, plain.negative)
        assert table.rows == plain.rows
    alone = pipeline.embed_prompts(model, PROMPTS[1:2], "other")
    # other shapes, so compiled otherwise
    np.testing.assert_allclose(alone.prompts[0], plain.prompts[1], atol=2e-5)
    assert not plain.padded(plain.prompts)[1, len(alone.prompts[0]) :].any()

    path = next((folder / "text_cache").glob("*.npy"))
    content = path.read_bytes()
    # computed again
    for damaged in (content[:50], content[:200] + bytes([content[200] ^ 1]) + content[201:]):
        path.write_bytes(damaged)
        mended = pipeline.embed_prompts(model, prompts, "ugly", cache=True)
        # one prompt is encoded anew, by a function compiled for another batch
        np.testing.assert_allclose(
            mended.padded(mended.prompts), plain.padded(plain.prompts), atol=2e-5
        )
        assert path.read_bytes() != damaged
    manifest = integrity.read_manifest(folder / "wan_jax.json")
    integrity.write_manifest(
        folder / "wan_jax.json", manifest | {"source": "another"}, manifest["files"]
    )
    loaded.clear()
    pipeline.embed_prompts(model_dir.open_model(folder), prompts, "ugly", cache=True)
    assert loaded == ["tokenizer", "text_encoder"]


def test_embeddings_of_another_tokenisation_are_not_read(folders, tmp_path, monkeypatch):
    model = model_dir.open_model(shutil.copytree(folders[1], tmp_path / "model"))
    rows = np.ones((3, 24), np.float32)
    PromptCache(model, np.float32).put("sea", rows)
    np.testing.assert_array_equal(PromptCache(model, np.float32).get("sea"), rows)
    monkeypatch.setattr(tokenizer, "VERSION", tokenizer.VERSION + 1)
    assert PromptCache(model, np.float32).get("sea") is None


def test_the_encoder_runs_on_the_device_that_is_given(folders):
    model, device = model_dir.open_model(folders[1]), jax.devices()[2]
    _, state = model_dir.build("text_encoder", model, device=device)
    assert {place for x in jax.tree.leaves(state) for place in x.devices()} == {device}
    there = pipeline.embed_prompts(model, PROMPTS, device=device)
    first = pipeline.embed_prompts(model, PROMPTS)
    for rows, expected in zip(there.prompts, first.prompts):
        np.testing.assert_array_equal(rows, expected)


def test_a_cache_that_cannot_be_written_is_no_error(folders, tmp_path):
    folder = shutil.copytree(folders[1], tmp_path / "model")
    (folder / "text_cache").write_text("a file where the folder should be")
    table = pipeline.embed_prompts(model_dir.open_model(folder), PROMPTS, cache=True)
    assert all(np.isfinite(rows).all() and rows.any() for rows in table.prompts)


def test_bfloat16_embeddings_stay_bfloat16(folders, tmp_path):
    folder = shutil.copytree(folders[1], tmp_path / "model")
    model = model_dir.open_model(folder)
    first, again = (
        pipeline.embed_prompts(model, PROMPTS, dtype=jnp.bfloat16, cache=True) for _ in range(2)
    )
    full = pipeline.embed_prompts(model, PROMPTS, cache=True)  # the types do not share files
    for a, b, c in zip(first.prompts, again.prompts, full.prompts):
        assert a.dtype == b.dtype == jnp.bfloat16 and c.dtype == np.float32
        np.testing.assert_array_equal(a, b)
        difference = np.linalg.norm(a.astype(np.float32) - c) / np.linalg.norm(c)
        assert 0 < difference < 0.05  # bfloat16 has 8 bits

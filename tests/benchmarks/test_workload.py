"""Tests of the workload of the benchmarks: FLOPs, batches, prompts, signs and records."""

import json

import numpy as np
import pytest

from benchmarks import workload
from benchmarks.workload import Record, Stage


def test_flops_of_a_forward_pass():
    config = workload.transformer_config("tiny")
    width, tokens, text = 256, 10, 65
    products = [(tokens, width, width)] * 6 + [(text, width, width)] * 2  # q, k, v, o; k, v of text
    products += [(tokens, width, 512), (tokens, 512, width)]
    products += [(tokens, width, keys) for keys in (tokens, text)] * 2  # scores and values
    assert workload.forward_flops(config, tokens) == 2 * sum(2 * m * k * n for m, k, n in products)


def test_guidance_doubles_a_batch():
    config, shape = workload.transformer_config("tiny"), workload.latent_shape(5, 64, 32)
    assert shape == (2, 8, 4, 16)
    plain = workload.batch_flops(config, shape, 3, 1.0)
    assert plain == 3 * workload.forward_flops(config, 16)
    assert workload.batch_flops(config, shape, 3, 4.5) == 2 * plain


def test_batches_of_an_epoch():
    rows = workload.epoch_rows(groups=2, group_size=6, batch=3, updates=2)
    assert [row.tolist() for row in rows] == np.arange(12).reshape(4, 3).tolist()
    for batch, updates in ((5, 1), (3, 3)):
        with pytest.raises(ValueError, match=rf"updates={updates} .*batch={batch}"):
            workload.epoch_rows(2, 6, batch, updates)


def test_signs_show_misspelt_targets_of_the_first_prompts():
    targets = [target for _, target in workload.prompts(2)]
    videos = workload.signs(targets, frames=3, height=64, width=128, seed=0)
    assert videos.shape == (2, 3, 64, 128, 3) and videos.dtype == np.uint8
    assert (videos[:, 0] == videos[:, 2]).all() and all(video.std() > 5 for video in videos)
    text = workload.misspelt("LETTERS", np.random.default_rng(0))
    assert len(text) == 7 and sum(a != b for a, b in zip(text, "LETTERS")) <= 3


def test_a_record_is_read_as_it_was_written(tmp_path):
    stage = Stage.of(0.5, 2**31, 1e12)
    assert (stage.ms, stage.peak_gib, stage.tflops) == (500.0, 2.0, 2.0)
    assert stage.mfu(4.0) == 0.5 and Stage.of(0.5, None).mfu(4.0) is None
    record = Record("ours", {"update": stage}, "GPU", "1.0")
    record.write(None)
    record.write(tmp_path / "record.json")
    assert Record.from_dict(json.loads((tmp_path / "record.json").read_text())) == record

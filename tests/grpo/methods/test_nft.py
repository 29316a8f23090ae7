"""DiffusionNFT: its loss, its weights of videos, its old policy, and a whole run."""

import dataclasses
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import tiny_ocr
from grpo import train
from grpo.methods.nft import NFT, nft_loss, optimality
from grpo.settings import parse
from tests.grpo.methods.velocity_rows import velocity_rows
from tests.grpo.tiny_run import arrays_of, assert_same, result


def test_half_optimal_videos_leave_the_old_policy_alone():
    """And at the old policy better than half pulls towards the video, worse pushes away from it."""
    rng = np.random.default_rng(0)
    x0, noise, v = (jnp.asarray(rng.standard_normal((3, 2, 4)), jnp.float32) for _ in range(3))
    sigma = jnp.array([0.2, 0.5, 0.9])
    x = (1 - sigma[:, None, None]) * x0 + sigma[:, None, None] * noise

    def gradient(r):
        return jax.grad(lambda new: nft_loss(x, x0, sigma, new, v, jnp.full(3, r), 0.3).sum())(v)

    better, half, worse = map(gradient, (1.0, 0.5, 0.0))
    assert np.abs(half).max() < 1e-6 < 1e-3 < np.abs(better).max()
    np.testing.assert_allclose(better, -worse, atol=1e-6)
    assert (np.asarray(better * (v - (noise - x0))).sum((1, 2)) > 0).all()


@pytest.mark.parametrize("by_cell", [False, True])
def test_the_gradient_holds_the_adaptive_weights(by_cell):
    """With the error D of the predicted clean sample it is -2 s (r D+ / w+ - (1 - r) D- / w-) / n for each
    value, times the cell's weight; w is as the loss has it, without gradient.
    """
    rng, beta = np.random.default_rng(1), 0.3
    x0, noise, v, old = rng.standard_normal((4, 3, 2, 4)).astype(np.float32)
    sigma, r = np.array([0.2, 0.5, 0.9], np.float32), np.array([0.1, 0.5, 0.8], np.float32)
    s = sigma[:, None, None].astype(np.float64)
    cells = rng.uniform(0.2, 1.8, (3, 2, 4)) if by_cell else np.ones((3, 2, 4))
    cells = (cells / cells.mean(axis=(1, 2), keepdims=True)).astype(np.float32)
    x = ((1 - s) * x0 + s * noise).astype(np.float32)
    wanted = 0.0
    for sign, share in ((1, r), (-1, 1 - r)):
        moved = (1 - sign * beta) * old.astype(np.float64) + sign * beta * v
        error = x - s * moved - x0
        size = np.mean(cells * np.abs(error), axis=(1, 2), keepdims=True)
        wanted -= sign * 2 * s * share[:, None, None] * cells * error / size / 8

    def total(v):
        return nft_loss(x, x0, sigma, v, old, r, beta, cells=cells if by_cell else None).sum()

    np.testing.assert_allclose(jax.grad(total)(jnp.asarray(v)), wanted, rtol=1e-4, atol=1e-6)


def test_optimality_is_clipped():
    found = optimality(np.array([-9.0, -2.5, 0.0, 5.0]), 5.0)
    np.testing.assert_allclose(found, [0, 0.25, 0.5, 1])
    assert found.dtype == np.float32


def test_the_old_policy_follows_at_the_end_of_an_epoch():
    nft = NFT(old_rate=0.01, old_most=0.05)
    kept = [nft.share_kept(update, update % 2 == 0) for update in range(1, 9)]
    assert kept == [{"old": share} for share in (1.0, 0.02, 1.0, 0.04, 1.0, 0.05, 1.0, 0.05)]
    assert nft.lagged == (nft.sampler,) == ("old",)


def test_the_distance_is_measured_only_with_a_bound():
    """Without one the compiled function is that of earlier versions, to the bit of its results."""
    config = tiny_ocr.get_config()
    assert parse.from_config(config).method.logs == ()
    config.train.max_velocity_distance = 1e3
    method = parse.from_config(config).method
    assert method.logs == ("old_distance",)
    v, old, x0 = np.random.default_rng(0).standard_normal((3, 2, 1, 3, 3, 4)).astype(np.float32)
    rows = velocity_rows(v, v - x0, np.full(2, 0.5, np.float32), lagged={"old": old})
    rows = dataclasses.replace(rows, x=x0, x0=x0, sigma=np.full(2, 0.5, np.float32))
    wanted = np.mean((v.astype(np.float64) - old) ** 2, axis=(1, 2, 3, 4))
    np.testing.assert_allclose(method.loss(rows)[1]["old_distance"], wanted, rtol=1e-5)


@pytest.mark.slow
def test_nft_samples_with_the_old_policy_and_resumes_bit_for_bit(start, capsys):
    """Two devices, two updates an epoch; after each epoch the old policy has followed by the
    formula.
    """
    spec, *rest = start(2, **{"train.method": "nft", "train.timesteps": 2, "train.old_rate": 0.1})
    run = pathlib.Path(spec.recipe.run_dir)
    train.train(spec, *rest)
    last = result(run)
    shutil.rmtree(run / "checkpoints" / "2")  # as if killed before it was saved
    first = arrays_of(run)
    for name in [n for n in first if "'old'" in n]:
        new, old = last[1][name.replace("'old'", "'trainable'")], first[name]
        np.testing.assert_allclose(last[1][name], 0.4 * old + 0.6 * new, atol=1e-7, err_msg=name)
        assert name.endswith("lora_a']") or np.abs(last[1][name] - new).max() > 0
    assert sum("'old'" in n for n in first) == sum("'trainable'" in n for n in first) > 0
    train.train(spec, *rest)
    assert_same(result(run), last)
    out = capsys.readouterr().out
    assert "continuing" in out and "epoch 2/2" in out
    assert ", ratio " not in out and "compiled again" not in out

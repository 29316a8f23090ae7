"""Flow-DPO: its reference, and a whole run."""

import pathlib

import numpy as np
import pytest

from grpo import train
from grpo.methods.dpo import DPO
from tests.grpo.methods.velocity_rows import velocity_rows
from tests.grpo.tiny_run import arrays_of


def test_the_reference_is_the_base_model_or_copied_every_few_updates():
    online = DPO(reference_every=3)
    kept = [online.share_kept(update, update % 2 == 0)["old"] for update in range(1, 7)]
    assert kept == [1, 1, 0, 1, 1, 0]
    assert online.lagged == ("old",) and online.sampler is None and not online.needs_reference
    assert DPO().needs_reference and DPO().lagged == () and DPO().share_kept(1, True) == {}


@pytest.mark.parametrize("every", [0, 4])
def test_the_loss_is_that_of_the_margin(every):
    """-log sigmoid(-beta / 2 ((d_w - r_w) - (d_l - r_l))); rows alternate between better and worse. The base
    model is the reference, or the copy; the other one has no say.
    """
    rng = np.random.default_rng(0)
    v, target, reference, other = rng.standard_normal((4, 6, 1, 3, 3, 4)).astype(np.float32)
    base, copy = (other, reference) if every else (reference, other)
    rows = velocity_rows(v, target, np.ones(3), lagged={"old": copy}, reference=base)
    loss, logged = DPO(beta=3.0, reference_every=every).loss(rows)
    errors, known = (
        np.mean((x.astype(np.float64) - target) ** 2, axis=(1, 2, 3, 4)) for x in (v, reference)
    )
    margin = (errors[::2] - known[::2]) - (errors[1::2] - known[1::2])
    # fp32 means of 36 squares of size 1 to 4
    np.testing.assert_allclose(loss, np.log1p(np.exp(3.0 / 2 * margin)), rtol=1e-5)
    assert np.asarray(logged["preferred"]).tolist() == (margin < 0).tolist()
    assert 0 < (margin < 0).sum() < 3


@pytest.mark.slow
def test_online_dpo_runs(start, capsys):
    """Pairs gathered from two devices, more than there are groups with spread; the reference is the
    last policy.
    """
    spec, *rest = start(
        2,
        **{
            "train.method": "dpo",
            "train.reference_every": 1,
            "train.timesteps": 1,
            "epochs": 1,
            "train.updates_per_epoch": 1,
        },
    )
    train.train(spec, *rest)
    arrays = arrays_of(pathlib.Path(spec.recipe.run_dir))
    assert "epoch 1/1" in capsys.readouterr().out
    for name in [n for n in arrays if "'old'" in n]:
        np.testing.assert_array_equal(arrays[name], arrays[name.replace("'old'", "'trainable'")])
    assert any(np.abs(v).max() > 0 for k, v in arrays.items() if "'old'" in k and "lora_b" in k)

"""Flow-DPO: its reference, and a whole run."""

import pathlib

import numpy as np
import pytest

from grpo import train
from grpo.methods.dpo import DPO
from tests.grpo.tiny_run import arrays_of


def test_the_reference_is_the_base_model_or_copied_every_few_updates():
    online = DPO(reference_every=3)
    kept = [online.share_kept(update, update % 2 == 0)["old"] for update in range(1, 7)]
    assert kept == [1, 1, 0, 1, 1, 0]
    assert online.lagged == ("old",) and online.sampler is None and not online.needs_reference
    assert DPO().needs_reference and DPO().lagged == () and DPO().share_kept(1, True) == {}


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

"""Signs as a user's folder of clips."""

import numpy as np
import pytest
from PIL import Image

from examples.tiny_wan import write_signs
from grpo.data.clips import find_clips
from rewards.ocr.targets import parse_targets
from wan_jax.errors import UserError


def test_signs_are_clips_with_captions_and_depend_on_the_seed(tmp_path, capsys):
    folders = [tmp_path / name for name in ("a", "same", "other")]
    for folder, seed in zip(folders, (3, 3, 4)):
        write_signs.write(folder, 5, seed)
    assert "5 signs" in capsys.readouterr().out
    clips, same, other = (find_clips(folder) for folder in folders)
    assert len(clips) == 5 and all(parse_targets(clip.prompt) for clip in clips)
    assert [c.prompt for c in clips] == [c.prompt for c in same] != [c.prompt for c in other]
    pictures = [
        np.stack([np.asarray(Image.open(clip.path)) for clip in found])
        for found in (clips, same, other)
    ]
    assert pictures[0].shape == (5, 64, 128, 3) and pictures[0].std() > 30
    np.testing.assert_array_equal(*pictures[:2])
    assert (pictures[0] != pictures[2]).any()
    with pytest.raises(UserError, match="choose a new folder"):
        write_signs.write(folders[0], 5, 3)

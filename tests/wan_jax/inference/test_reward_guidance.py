"""Files of reward heads that are damaged. tests/grpo/test_reward_head.py has what heads predict."""

import pytest
import safetensors
from safetensors.numpy import load_file, save_file

from tests.grpo.tiny_policy import CONFIG
from wan_jax.errors import UserError
from wan_jax.inference import reward_guidance


@pytest.fixture(scope="module")
def head_file(tmp_path_factory):
    """The file of a random head."""
    path = tmp_path_factory.mktemp("head") / "head.safetensors"
    config = reward_guidance.head_config(CONFIG, heads=1, layers=1)
    reward_guidance.save_head(path, reward_guidance.make_head(config), {"model": "tiny"})
    return path


def contents(path):
    """(Metadata, arrays) of a file."""
    with safetensors.safe_open(path, framework="numpy") as file:
        return dict(file.metadata()), load_file(path)


def damage(head_file, path, change):
    """Write a file's contents after change(metadata, arrays)."""
    metadata, arrays = contents(head_file)
    change(metadata, arrays)
    save_file(arrays, path, metadata)
    return path


def test_a_changed_bit_is_found(head_file, tmp_path):
    """In the last array, and in the text about it."""
    whole = head_file.read_bytes()
    at = whole.index(b'"model":"tiny"') + len('"model":"')
    for number in (len(whole) - 1, at):
        changed = bytearray(whole)
        changed[number] ^= 1
        path = tmp_path / f"{number}.safetensors"
        path.write_bytes(changed)
        with pytest.raises(UserError, match=rf"{number}\.safetensors is damaged"):
            reward_guidance.load_head(path, CONFIG)
    reward_guidance.load_head(head_file, CONFIG)


@pytest.mark.parametrize("kind", ["missing", "unknown", "shape"])
def test_wrong_arrays_are_named(head_file, tmp_path, kind):
    """Also without a digest, as files of earlier versions."""
    named = "proj_out/other" if kind == "unknown" else "proj_out/bias"

    def change(metadata, arrays):
        del metadata["digest"]
        bias = arrays["proj_out/bias"]
        if kind == "missing":
            del arrays[named]
        else:
            arrays[named] = bias[:1].copy()

    path = damage(head_file, tmp_path / "head.safetensors", change)
    with pytest.raises(UserError, match=rf"1 arrays are missing.*\({named}\)"):
        reward_guidance.load_head(path, CONFIG)

"""`python -m grpo.best_of`: the best of N candidates is written, by ocr or by a reward of one's own."""

import re
import subprocess

import numpy as np
import pytest
from PIL import Image

from tests import commands
from wan_jax.inference import reward_guidance
from wan_jax.storage import model_dir

OWN = """
class Redness:
    def score(self, video, request):
        return float(video[..., 0].mean()) / 255

class Metadata:
    def score(self, video, request):
        return len(request.metadata["kind"]) + float(video[..., 2].mean()) / 255
"""
SIZE = ("--height=16", "--width=32", "--steps=4", "--workers=1")


@pytest.fixture
def best_of(model, tmp_path):
    """A function that runs the command in a folder with rewards of one's own: its process."""
    (tmp_path / "red_own.py").write_text(OWN)

    def run(*flags):
        return subprocess.run(
            commands.command("grpo.best_of", f"--model={model}", *SIZE, *flags),
            capture_output=True,
            text=True,
            env=commands.environment(),
            cwd=tmp_path,
        )

    return run


def red(path):
    return np.asarray(Image.open(path))[..., 0].mean() / 255


@pytest.mark.slow
def test_the_reddest_of_each_prompt_is_written(best_of, tmp_path):
    lines = ('{"prompt": "sea", "kind": "water"}', '{"prompt": "sky", "kind": "air"}')
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    common = ("--reward=red_own:Redness", "--best_of=3", "--prompts=p.jsonl")
    done = best_of(*common, "--judge=red_own:Metadata", "--keep_all", "--out=o.png")
    assert done.returncode == 0, done.stdout + done.stderr
    values = [
        [*map(float, v.split())] for v in re.findall(r"candidates 0, 1, 2: (.*)", done.stdout)
    ]
    chosen = [*map(int, re.findall(r"candidate (\d): reward", done.stdout))]
    judged = [float(v) for v in re.findall(r"judge (\d\.\d+)[;,]", done.stdout)]
    assert len(values) == 2 and chosen == [int(np.argmax(v)) for v in values]
    assert [int(v) for v in judged] == [5, 3], "the judge gets the line's other fields"
    for i, (best, row) in enumerate(zip(chosen, values)):
        assert red(tmp_path / f"o_00{i}.png") == pytest.approx(max(row), abs=1e-3)
        others = sorted(path.name for path in tmp_path.glob(f"o_00{i}_*"))
        assert others == [f"o_00{i}_candidate_0{n}.png" for n in range(3) if n != best]
    found = re.search(
        r"best of 3: judge (\S+) on 2 .*\nchosen by reward, which reads (\S+)\n", done.stdout
    )
    means = np.mean(judged), np.mean([max(row) for row in values])
    assert [*map(float, found.groups())] == pytest.approx(means, abs=1.1e-3)  # of rounded ones
    assert "best of 1: judge" in done.stdout


@pytest.mark.slow
def test_pruned_candidates_are_not_finished(best_of, model, tmp_path):
    opened = model_dir.open_model(model)
    config = reward_guidance.head_config(opened.config("transformer"), heads=1, layers=1)
    head = reward_guidance.make_head(config)
    about = {"wan_jax_model": opened.fingerprint, "model": str(model)}
    reward_guidance.save_head(tmp_path / "head.safetensors", head, about)
    flags = ("--reward=red_own:Redness", "--prompt=sea", "--best_of=4", "--out=o.png")
    done = best_of(*flags, "--prune_head=head.safetensors", "--prune_at=0.6", "--keep_all")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 of 4 candidates went on after" in done.stdout
    assert "the same reader (reward) chose" in done.stdout
    assert len(list(tmp_path.glob("o_candidate_*"))) == 1 and (tmp_path / "o.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, key",
    [
        (("--prompt=sea",), "no quoted text"),
        (('--prompt="sea"', "--judge=rapidocr"), "--judge=rapidocr is what chooses"),
        (('--prompt="sea"', "--samples=2"), "--samples has no effect"),
        (('--prompt="sea"', "--prune_at=0.5"), "--prune_at has no effect"),
        (("--prompt=sea", "--reward=missing:X"), "there is no module 'missing'"),
    ],
)
def test_mistakes_are_one_line_before_any_work(best_of, flags, key):
    done = best_of(*flags, "--out=o.png")
    assert done.returncode == 1 and key in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1 and "candidate" not in done.stdout

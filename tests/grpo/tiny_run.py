"""A tiny recipe with its model and prompts, and what a run leaves in its folder."""

import json
import pathlib

import jax
import numpy as np
import orbax.checkpoint as ocp

from convert.from_diffusers import convert
from tests import tiny
from wan_jax.storage.checkpoint import Checkpoints

RECIPE = """
from configs.defaults import defaults

def get_config():
    c = defaults()
    c.run_dir = {run!r}
    c.epochs = 3
    c.model.path = {model!r}
    c.model.dtype = "float32"
    c.model.remat = "none"
    c.lora.rank = 4
    c.prompts.train = {train!r}
    c.prompts.heldout = {heldout!r}
    c.sample.height, c.sample.width = 16, 32
    c.sample.steps, c.sample.sde_steps, c.sample.sde_range = 3, 2, (0, 3)
    c.sample.guidance = 1.0
    c.sample.groups, c.sample.group_size, c.sample.batch_size = 2, 4, 4
    c.train.method = "grpo"
    c.train.updates_per_epoch = 2
    c.train.advantage_std = "global"
    c.eval.every, c.eval.num_prompts, c.eval.steps, c.eval.guidance, c.eval.previews = 2, 4, 2, 1.0, 2
    c.save.every = 1
    c.reward.workers = 0
    return c
"""
# In a random model's pictures nothing can be read. They differ in these, so that there is something
# to learn.
MEASURES = [
    f"reward.weights.{name}=1.0"
    for name in ("sharpness", "exposure", "contrast", "compressibility")
]
# Frames with a side below 64 pixels are enlarged before they are read: 16 x 32 pixels would take
# eight times longer.
PICTURE = ("sample.height=64", "sample.width=64")
WORDS = "open exit cafe salt moon tide fern lamp".split()


def make_model(folder: pathlib.Path, boundary: float | None = None) -> pathlib.Path:
    """Write a random tiny model into a new folder and return its path. boundary: it has two experts
    then.
    """
    source = tiny.write_pipeline(folder / "source", seed=3, boundary=boundary)
    convert(str(source), folder / "model", "float32")
    return folder / "model"


def recipe_text(model: str, folder: str) -> str:
    """Return the text of a recipe's file."""
    return RECIPE.format(
        run=f"{folder}/run",
        model=model,
        train=f"{folder}/train.txt",
        heldout=f"{folder}/heldout.txt",
    )


def write_recipe(model: pathlib.Path, folder: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """Write a recipe and its prompts into a folder; return (config file, run folder)."""
    for name, words in (("train", WORDS[:4]), ("heldout", WORDS[4:])):
        lines = "".join(f'A sign that says "{word}".\n' for word in words)
        (folder / f"{name}.txt").write_text(lines)
    path = folder / "recipe.py"
    path.write_text(recipe_text(str(model), str(folder)))
    return path, folder / "run"


def config_of(text: str, **values):
    """Return the ConfigDict of a recipe's text, changed by {'section.key': value}."""
    namespace: dict = {}
    exec(text, namespace)
    config = namespace["get_config"]()
    config.update_from_flattened_dict(values)
    return config


def newest(run: pathlib.Path) -> int | None:
    """Return the epoch of a run's newest checkpoint."""
    return Checkpoints(run).latest()


def arrays_of(run: pathlib.Path) -> dict[str, np.ndarray]:
    """Return every array of a run's newest checkpoint by its path."""
    flat = {}
    for item in ("state", "trained"):
        folder = run.absolute() / "checkpoints" / str(newest(run)) / item
        tree = ocp.StandardCheckpointer().restore(folder)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            flat[item + jax.tree_util.keystr(path)] = np.asarray(leaf)
    return flat


def records_of(run: pathlib.Path) -> list[list[dict]]:
    """Return a run's metrics and evaluations, without clock and memory."""
    records, measured = [], ("time", "peak_memory", "idle_share")
    for name in ("metrics.jsonl", "evals.jsonl"):
        lines = [json.loads(line) for line in (run / name).read_text().splitlines()]
        records.append(
            [
                {k: v for k, v in line.items() if "seconds" not in k and k not in measured}
                for line in lines
            ]
        )
    return records


def result(run: pathlib.Path) -> tuple:
    """Return everything that a run computed: (newest epoch, arrays, records)."""
    return newest(run), arrays_of(run), records_of(run)


def assert_same(a: tuple, b: tuple) -> None:
    """Assert that two runs' results are equal to the bit."""
    assert a[0] == b[0] and a[1].keys() == b[1].keys() and a[2] == b[2]
    assert len(a[1]) > 20
    for name in a[1]:
        np.testing.assert_array_equal(a[1][name], b[1][name], err_msg=name)

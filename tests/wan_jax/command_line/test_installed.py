"""Recipes and prompts of the project in any folder: as modules here, and from a wheel."""

import importlib
import importlib.metadata
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

from tests import commands
from wan_jax.command_line import installed, recipe_files
from wan_jax.command_line.cli import read_text
from wan_jax.errors import UserError

PACKAGES = ("wan_jax", "grpo", "rewards", "convert", "configs")


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A folder with a package `configs` of its own; the package that was imported is put back."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/__init__.py").touch()
    (tmp_path / "configs/base.py").write_text("SEED = 77\n")
    (tmp_path / "configs/mine.py").write_text(
        "from configs import base, tiny_ocr\n"
        "def get_config():\n"
        "    c = tiny_ocr.get_config()\n"
        "    c.seed = base.SEED\n"
        "    return c\n"
    )
    monkeypatch.chdir(tmp_path)
    before = {name: module for name, module in sys.modules.items() if name.startswith("configs")}
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("configs")]:
        del sys.modules[name]
    sys.modules.update(before)


def test_a_file_of_the_folder_comes_before_an_installed_one(elsewhere):
    prompts = "assets/prompts/tiny_heldout.txt"
    assert installed.data_file(prompts) == installed.ROOT / prompts
    assert read_text(prompts, "prompt file", "").startswith("A ")
    (elsewhere / "assets/prompts").mkdir(parents=True)
    (elsewhere / prompts).write_text('A sign that says "mine".\n')
    assert read_text(prompts, "prompt file", "") == 'A sign that says "mine".\n'
    for other in ("assets/none.txt", "pyproject.toml", "../assets/prompts/tiny_heldout.txt"):
        assert installed.data_file(other) == pathlib.Path(other)


def test_recipes_are_found_by_name_and_by_path(elsewhere):
    root = installed.ROOT
    assert recipe_files.recipe_path("configs/tiny_ocr.py") == str(root / "configs/tiny_ocr.py")
    assert recipe_files.recipe_path("tiny_ocr:1") == f"{root}/configs/tiny_ocr.py:1"
    published = recipe_files.recipe_path("flow_grpo_wan21_1_3b")
    assert published == str(root / "configs/published/flow_grpo_wan21_1_3b.py")
    assert recipe_files.recipe_path("mine.py") == "configs/mine.py"
    with pytest.raises(UserError, match=r"tiny_orc .*did you mean configs/tiny_ocr\.py"):
        recipe_files.recipe_path("tiny_orc")


def test_configs_is_this_projects_package_with_the_folders_modules(elsewhere, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("configs")]:
        del sys.modules[name]
    monkeypatch.syspath_prepend(elsewhere)
    assert importlib.import_module("configs").__file__ == str(elsewhere / "configs/__init__.py")
    installed.import_configs()
    config = importlib.import_module("configs.mine").get_config()
    assert config.seed == 77 and config.prompts.train == "assets/prompts/tiny_train.txt"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The project's wheel, built from copies of its files."""
    version = importlib.metadata.version("setuptools").partition(".")[0]
    if int(version) < 77:
        pytest.skip(f"setuptools {version} is older than pyproject.toml needs")
    source = tmp_path_factory.mktemp("source")
    for name in (*PACKAGES, "assets/prompts"):
        shutil.copytree(commands.ROOT / name, source / name, symlinks=True)
    (source / "assets/tiny-wan").mkdir()
    (source / "assets/tiny-wan/model_index.json").write_text("{}")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(commands.ROOT / name, source)
    build = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"
    done = subprocess.run(
        [sys.executable, "-c", build], cwd=source, capture_output=True, text=True, check=True
    )
    assert "Warning" not in done.stderr
    return source / done.stdout.splitlines()[-1]


@pytest.mark.slow
def test_a_wheel_has_what_recipes_need(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    folders = {name.partition("/")[0] for name in names}
    assert {name for name in folders if "dist-info" not in name} == set(PACKAGES)
    expected = {
        f"configs/assets/prompts/{path.name}"
        for path in (commands.ROOT / "assets/prompts").iterdir()
    } | {f"configs/{path.name}" for path in (commands.ROOT / "configs").glob("*.txt")}
    assert expected <= set(names) and len(expected) > 4
    assert not [name for name in names if "tiny-wan" in name]
    assert wheel.stat().st_size < 5_000_000


@pytest.mark.slow
def test_a_wheel_trains_in_a_folder_with_other_configs(wheel, elsewhere):
    """As far as the model, which is missing: recipe and prompts were found before."""
    package = elsewhere / "site"
    zipfile.ZipFile(wheel).extractall(package)
    env = commands.environment()
    env["PYTHONPATH"] = os.pathsep.join([str(package), env["PYTHONPATH"]])
    done = subprocess.run(
        commands.fresh(
            "grpo.train", "--config=mine", "--config.model.path=none", "--config.run_dir=run"
        ),
        env=env,
        cwd=elsewhere,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "none" in done.stderr and "prompt" not in done.stderr

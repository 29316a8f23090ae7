"""Recipes and prompts that are installed with the project, for commands in any folder."""

import importlib.util
import pathlib
import sys

ROOT = pathlib.Path(__file__).parents[2]  # a checkout, or site-packages
CONFIGS = ROOT / "configs"  # its link `assets` leads to the prompts, so that a wheel has them


def data_file(path) -> pathlib.Path:
    """Return the path, or if nothing is there the installed file of that name: configs/... and
    assets/prompts/...
    """
    path = pathlib.Path(path)
    if not path.exists() and not path.is_absolute() and ".." not in path.parts:
        for folder in (ROOT, CONFIGS):
            if path.parts[:1] in (("configs",), ("assets",)) and (folder / path).is_file():
                return folder / path
    return path


def import_configs() -> None:
    """Let `configs` be this project's package, also where the current folder has one, whose modules
    are found as well unless ours have the same names.

    Recipes begin with `from configs.defaults import defaults`.
    """
    package = sys.modules.get("configs")
    if package is None or package.__file__ != str(CONFIGS / "__init__.py"):
        spec = importlib.util.spec_from_file_location("configs", CONFIGS / "__init__.py")
        assert spec is not None and spec.loader is not None
        package = sys.modules["configs"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(package)
    own = str(pathlib.Path("configs").absolute())
    if own not in package.__path__:
        package.__path__.append(own)

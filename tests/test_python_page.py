"""docs/reference/python.md names the functions, their parameters and the options as they are."""

import ast
import inspect
import re

import wan_jax
from grpo import api
from tests.commands import ROOT
from wan_jax.api import Options

PAGE = (ROOT / "docs/reference/python.md").read_text()
OPENINGS = {"wan_jax": wan_jax, "grpo.api": api}


def signature(name: str) -> str:
    """Return a function's parameters and defaults, without annotations."""
    module = next(opening for opening in OPENINGS if name.startswith(f"{opening}."))
    found = OPENINGS[module]
    for part in name.removeprefix(f"{module}.").split("."):
        found = getattr(found, part)
    plain = inspect.signature(found)
    bare = [p.replace(annotation=p.empty) for p in plain.parameters.values()]
    return f"{name}{plain.replace(parameters=bare, return_annotation=plain.empty)}"


def test_every_function_has_a_heading_with_its_signature():
    headings = re.findall(r"^### `(.+)`$", PAGE, re.MULTILINE)
    named = [heading.partition("(")[0] for heading in headings]
    assert headings == [signature(name) for name in named]
    public = {f"wan_jax.{name}" for name in wan_jax.__all__} - {"wan_jax.Model"}
    public |= {
        f"grpo.api.{name}"
        for name, value in vars(api).items()
        if getattr(value, "__module__", "") == api.__name__ and not name.startswith("_")
    }
    methods = {
        f"wan_jax.{kind.__name__}.{name}"
        for kind in (wan_jax.Model, wan_jax.Videos)
        for name, value in vars(kind).items()
        if inspect.isfunction(value) and not name.startswith("_")
    }
    assert set(named) == public | methods


def test_the_options_are_all_described():
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", PAGE, re.MULTILINE)
    names = re.findall(r"`(\w+)`", " ".join(rows))
    assert names == [*Options.__annotations__]


def test_the_examples_are_short_and_call_what_exists():
    sample, train = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert len(ast.parse(sample).body) == 2 and len(ast.parse(train).body) == 3
    calls = [node for code in (sample, train) for node in ast.walk(ast.parse(code))]
    called = {ast.unparse(node.func) for node in calls if isinstance(node, ast.Call)}
    assert called >= {"wan_jax.load", "api.train", "api.recipe"}
    assert all(hasattr(api, name[4:]) for name in called if name.startswith("api."))

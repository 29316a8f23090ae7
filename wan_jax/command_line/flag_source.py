"""The flags of a command from its source, without importing it, which would take seconds for JAX.

Only the calls of a command's module that define flags are executed, with the imports and the
constants that these calls name. So help and completion cannot differ from the flags themselves.
What the calls import does not import JAX; a test checks that for every command.
"""

import ast
import dataclasses
import importlib.util
import pathlib
import re
from collections.abc import Iterator

from absl import flags

DEFINE = re.compile(r"DEFINE(_\w+)?|define_(number|path)|mark_flag_as_required")
PLAIN = (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.Expr)


@dataclasses.dataclass(frozen=True)
class Source:
    """The source of a command.

    Attributes:
        description: docstring of its module.
        statements: imports, assignments and calls of the module and of its `if __name__` block.
    """

    description: str
    statements: tuple[ast.stmt, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the flags that are defined, in the order of the source."""
        calls = [call for node in self.statements if (call := _definition(node))]
        return tuple(
            str(call.args[0].value)
            for call in calls
            if isinstance(call.args[0], ast.Constant) and _name(call) != "mark_flag_as_required"
        )

    def define(self) -> list[flags.Flag]:
        """Define the flags, unless that was done before, and return them."""
        if not all(name in flags.FLAGS for name in self.names):
            code = ast.Module([*_needed(self.statements)], [])
            exec(compile(code, "<flags>", "exec"), {"__name__": "<flags>"})
        return [flags.FLAGS[name] for name in self.names]


def read(module: str) -> Source | None:
    """Return the source of a command, by the name that `python -m` takes; None if there is none."""
    spec = importlib.util.find_spec(module)
    if spec is not None and spec.submodule_search_locations is not None:
        spec = importlib.util.find_spec(f"{module}.__main__")
    if spec is None or spec.origin is None:
        return None
    tree = ast.parse(pathlib.Path(spec.origin).read_text(encoding="utf-8"))
    bodies = (node.body if isinstance(node, ast.If) else [node] for node in tree.body)
    statements = tuple(node for body in bodies for node in body if isinstance(node, PLAIN))
    return Source(ast.get_docstring(tree, clean=False) or "", statements)


def _needed(statements: tuple[ast.stmt, ...]) -> Iterator[ast.stmt]:
    """Yield the definitions of flags, and before them what they name."""
    needed: set[str] = set()
    chosen: list[ast.stmt] = []
    for node in reversed(statements):  # a name is bound before it is used
        if isinstance(node, ast.Import | ast.ImportFrom):
            node.names = [
                alias
                for alias in node.names
                if (alias.asname or alias.name.partition(".")[0]) in needed
            ]
            wanted = bool(node.names)
        else:
            targets = (
                [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
            )
            wanted = bool(_definition(node)) or any(_names(t) & needed for t in targets)
            if wanted:
                needed |= _names(node)
        if wanted:
            chosen.append(node)
    return reversed(chosen)


def _definition(node: ast.stmt) -> ast.Call | None:
    """Return the call by which a statement defines a flag or marks one as required, or None."""
    call = getattr(node, "value", None)
    return call if isinstance(call, ast.Call) and DEFINE.fullmatch(_name(call)) else None


def _name(call: ast.Call) -> str:
    """Return the name of the function that is called, without its module."""
    return getattr(call.func, "attr", None) or getattr(call.func, "id", "")


def _names(node: ast.AST) -> set[str]:
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}

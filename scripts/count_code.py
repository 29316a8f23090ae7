"""Prints the counts of docs/explanation/architecture.md, of this tree or another one.

    python scripts/count_code.py [FOLDER]

Lines are those of the files. Lines of code are those that hold a token other than a comment or a
docstring. Parameters are named ones without self and cls. A module has a test of its name where
tests/ has test_NAME.py in any folder; `__init__.py` and `__main__.py` do not count.
"""

import ast
import collections
import io
import pathlib
import sys
import tokenize

PACKAGES = ("wan_jax", "grpo", "rewards", "convert")
SUITE = ("configs", "examples", "benchmarks", "tests")
LIMIT = 400  # lines of a module
LAYOUT = {
    getattr(tokenize, name)
    for name in ("COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT", "ENCODING", "ENDMARKER")
}


def code_lines(text: str) -> int:
    """Return the number of lines with code: without docstrings, comments and blank lines."""
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in LAYOUT:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if ast.get_docstring(node, clean=False) is not None:
            docstring = node.body[0]
            lines.difference_update(range(docstring.lineno, (docstring.end_lineno or 0) + 1))
    return len(lines)


def parameters(text: str) -> list[tuple[int, str]]:
    """Return the number of parameters of each function, with its name."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            args = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            found.append((len([a for a in args if a.arg not in ("self", "cls")]), node.name))
    return found


def main(root: pathlib.Path) -> None:
    def read(folder: str) -> dict[pathlib.Path, str]:
        files = sorted((root / folder).rglob("*.py"))
        return {f.relative_to(root): f.read_text() for f in files if "__pycache__" not in f.parts}

    sources = {folder: read(folder) for folder in (*PACKAGES, *SUITE)}
    product = {path: text for name in PACKAGES for path, text in sources[name].items()}
    print("folder: files, lines, lines of code")
    for name, files in (sources | {"the four packages": product}).items():
        lines = sum(len(text.splitlines()) for text in files.values())
        print(f"  {name}: {len(files)}, {lines:,}, {sum(map(code_lines, files.values())):,}")

    modules = product | sources["configs"]
    long = {
        path: len(text.splitlines()) for path, text in (modules | sources["benchmarks"]).items()
    }
    over = {path: count for path, count in long.items() if count > LIMIT}
    print(
        f"modules of more than {LIMIT} lines: {len(over)}", *(f"{p} {n}" for p, n in over.items())
    )

    print("entries of the largest folders (modules):")
    entries = collections.defaultdict(set)
    for path in product:
        for depth in range(1, len(path.parts)):
            entries[pathlib.Path(*path.parts[:depth])].add(path.parts[depth])
    for folder, names in sorted(entries.items(), key=lambda item: -len(item[1]))[:6]:
        print(f"  {folder}: {len(names)} ({len([n for n in names if n.endswith('.py')])})")

    counted = [
        (n, f"{path}:{name}") for path, text in product.items() for n, name in parameters(text)
    ]
    print("parameters of the functions with most:")
    for count, name in sorted(counted, reverse=True)[:10]:
        print(f"  {count} {name}")

    tests = {path.stem for path in sources["tests"]}
    named = [path for path in modules if not path.stem.startswith("__")]
    without = [str(path) for path in named if f"test_{path.stem}" not in tests]
    print(f"modules without a test of their name: {len(without)} of {len(named)}:", *without)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "."))

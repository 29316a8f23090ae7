"""Configuration of the documentation site: Sphinx with MyST (Markdown) and Furo. `bash scripts/docs.sh` builds it.

Sphinx was chosen because it checks links, anchors and references by itself, documents the Python
functions from their docstrings without a further package, and searches without a server.
The pages stay plain Markdown, so that they can be read in the repository, too.
"""

import importlib
import pathlib
import re
import sys
import tomllib

ROOT = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

generated = importlib.import_module("generated")  # docs/generated.py

project = "wan-jax-grpo"
version = release = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
project_copyright = "the authors of wan-jax-grpo, Apache-2.0"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build"]
default_role = "literal"  # of single backticks in docstrings
nitpicky = False  # types in signatures have no pages; links in pages are always checked

# ---- Markdown ---------------------------------------------------------------------------------------
myst_enable_extensions = ["attrs_block", "attrs_inline", "colon_fence", "deflist"]
myst_heading_anchors = 4

# ---- Python -----------------------------------------------------------------------------------------
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True}
python_maximum_signature_line_length = 88

# ---- HTML -------------------------------------------------------------------------------------------
html_theme = "furo"
html_title = f"wan-jax-grpo {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
smartquotes = False  # --flags keep both dashes
html_show_sphinx = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#1f5fae", "color-brand-content": "#1f5fae"},
    "dark_css_variables": {"color-brand-primary": "#7db4f7", "color-brand-content": "#7db4f7"},
}
copybutton_prompt_text = "$ "


def mend_links(app, name, source):
    """Replace links to folders outside of docs, which the site does not have, by their text, and
    links to the notebook, which readers of the repository open, by its page. On the pages that are
    made from the code, make links of the names of pages.
    """
    folder = pathlib.Path(app.srcdir, name).parent

    def of_folder(match):
        return f"`{match[1]}`" if (folder / match[2]).is_dir() else match[0]

    source[0] = re.sub(r"\[([\w/.-]+)\]\((\.\./[\w/.-]+)\)", of_folder, source[0])
    notebook = rf"\]\((?:\.\./)+{re.escape(generated.NOTEBOOK)}\)"
    source[0] = re.sub(notebook, "](/tutorial/first_steps.md)", source[0])
    if name in ("reference/commands", "reference/settings"):
        page = re.compile(r"(?<![\w/`\[])(?<!> )docs/([\w/]+\.md)")
        lines = (
            line if line.startswith("    ") else page.sub(r"[docs/\1](../\1)", line)
            for line in source[0].split("\n")
        )
        source[0] = "\n".join(lines)


def setup(app):
    """Write the pages that are made from the code before the others are read."""
    app.connect("config-inited", lambda app, config: generated.write(pathlib.Path(app.srcdir)))
    app.connect("source-read", mend_links)

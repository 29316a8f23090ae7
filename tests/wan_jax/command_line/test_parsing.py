"""What a user sees after a mistake in a recipe or a flag."""

import pytest
from absl import app, flags
from ml_collections import config_flags

from wan_jax.command_line import parsing
from wan_jax.command_line.recipe_files import stray_argument

RECIPE = "from configs.defaults import defaults\n\ndef get_config():\n    c = defaults()\n    {line}\n    return c\n"


@pytest.fixture
def parse(monkeypatch, capsys, tmp_path):
    """Parses a command line in a folder with recipes: (exit code, standard error), or what is
    left of it.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs/published").mkdir(parents=True)
    for name in ("tiny_ocr", "tiny_grpo", "defaults", "published/amd_14b", "published/common"):
        (tmp_path / f"configs/{name}.py").write_text(RECIPE.format(line="c.seed = 7"))

    def run(*arguments, required="config"):
        values = flags.FlagValues()
        argv = ["train", *arguments]
        config_flags.DEFINE_config_file("config", None, flag_values=values, sys_argv=argv)
        flags.DEFINE_flag(app.HelpFlag(), flag_values=values)
        flags.mark_flag_as_required(required, flag_values=values)
        monkeypatch.setattr(flags, "FLAGS", values)
        try:
            return parsing.parse_flags(argv), values
        except SystemExit as ended:
            return ended.code, capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--config=configs/tiny_orc.py"],
            "configs/tiny_orc.py does not exist; did you mean configs/tiny_ocr.py?",
        ),
        (["--config=tiny_grop.py", "--config.seed=1"], "did you mean configs/tiny_grpo.py?"),
        (
            ["--config", "zebra"],
            "--config=zebra does not exist; give a Python file with get_config()",
        ),
        (["--config=configs/amd_14.py"], "did you mean configs/published/amd_14b.py?"),
        (["--config=configs"], "--config=configs is a folder"),
        (["configs/tiny_ocr.py"], "recipes are given as --config=configs/tiny_ocr.py"),
        ([], "--config is missing"),
        (["--config=tiny_ocr", "--config.seed=x"], "--config.seed=x: expected a whole number;"),
        (
            ["--config=tiny_ocr", "--config.train.offload_optimiser=yes"],
            "--config.train.offload_optimiser=yes: expected True or False;",
        ),
        (
            ["--config=tiny_ocr", "--config.train.learning_rate=x"],
            "--config.train.learning_rate=x: expected a number;",
        ),
        (["tiny_ocr"], "'tiny_ocr' is not given as a flag; is it --config=tiny_ocr?"),
        (
            ["--config=tiny_ocr", "--train.learning_rate=3"],
            "settings are given as --config.train.learning_rate=",
        ),
        (
            ["--config=configs/tiny_ocr.py", "--config.sed=1"],
            'Did you mean "seed" instead of "sed"',
        ),
    ],
)
def test_one_line_says_what_to_type(parse, arguments, message):
    code, err = parse(*arguments)
    assert code == 1 and message in err and err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("c.seed = 'abc'", "abc is of original type"),
        ("c.seed = 1 / 0", "division by zero"),
        ("c.seed = x", "'x' is not"),
        ("import no_such_package", "No module named"),
        ("c.seed = (", "was never closed"),
    ],
)
def test_an_error_in_a_recipe_is_one_line_with_its_place(parse, tmp_path, line, message):
    path = tmp_path / "mine.py"
    path.write_text(RECIPE.format(line=line))
    code, err = parse(f"--config={path}")
    assert code == 1 and message in err and err.count("\n") == 1 and "mine.py" in err and "5" in err


def test_a_recipe_in_the_home_folder(parse, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "configs"))
    _, values = parse("--config=~/tiny_ocr.py")
    assert values["config"].value.seed == 7


def test_a_setting_without_its_prefix_is_named_with_it():
    assert "--config.train.learning_rate=3" in stray_argument("train.learning_rate=3")
    assert "--config" not in stray_argument("red.sign")


def test_help_is_no_error(parse):
    assert parse("--help")[0] == 0


def test_the_last_of_several_settings_counts():
    given = [
        "x",
        "--config=a.py",
        "--config.a=1",
        "--config.ab=(1,2)",
        "--config.a=2",
        "--out=o",
        "--out=p",
        "--config.on",
        "--config.ab=(3,)",
        "--config.on",
    ]
    assert parsing.last_of_each(given) == [
        "x",
        "--config=a.py",
        "--config.a=2",
        "--out=o",
        "--out=p",
        "--config.on",
        "--config.ab=(3,)",
        "--config.on",
    ]

"""Flags of numbers and paths, and files that could not be written in the end."""

import pytest
from absl import flags

from wan_jax.command_line.cli import UserError
from wan_jax.command_line.flag_types import NumberParser, PathParser, check_used
from wan_jax.command_line.limits import SAMPLES, SEED, STEPS, Range
from wan_jax.storage import media


def parsed(parser, argument):
    """The value of a flag, or what its user is told."""
    values = flags.FlagValues()
    flags.DEFINE(parser, "x", None, "", flag_values=values)
    try:
        values(["program", f"--x={argument}"])
    except flags.IllegalFlagValueError as error:
        return str(error)
    return values["x"].value


@pytest.mark.parametrize(
    ("kind", "limits", "argument", "found"),
    [
        (float, media.FPS, "23.976", 23.976),
        (float, media.FPS, "0", "flag --x=0: must be at least 0.1 and at most 1000"),
        (int, Range(1), "3", 3),
        (int, Range(1), "0", "flag --x=0: must be at least 1"),
        (int, Range(1), "1.5", "flag --x=1.5: must be a whole number"),
        (float, Range(0), "x", "flag --x=x: must be a number"),
        (float, Range(0), "nan", "flag --x=nan: must be at least 0 and finite"),
        (float, Range(0), "inf", "flag --x=inf: must be at least 0 and finite"),
        (int, STEPS, "1000", 1000),
        (
            int,
            STEPS,
            "100000",
            "flag --x=100000: must be at least 1 and at most 1000; Wan is trained with 1000 timesteps",
        ),
        (
            int,
            SAMPLES,
            "10001",
            "flag --x=10001: must be at least 1 and at most 10000; for more, run "
            "again with another seed",
        ),
        (int, SEED, str(2**32 - 1), 2**32 - 1),
        *(
            (
                int,
                SEED,
                seed,
                f"flag --x={seed}: must be at least 0 and at most 4294967295; -1 does not stand "
                "for a random seed, choose a number",
            )
            for seed in ("-1", str(2**32), str(2**63))
        ),
    ],
)
def test_numbers(kind, limits, argument, found):
    assert parsed(NumberParser(kind, limits), argument) == found


def test_paths(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert parsed(PathParser(), "~/a") == parsed(PathParser(), "b/../a") == str(tmp_path / "a")
    assert parsed(PathParser(), "b/a..c") == "b/a..c"
    assert "is empty" in parsed(PathParser(), "")
    assert "nobody-of-this-name" in parsed(PathParser(), "~nobody-of-this-name/a")


def test_a_flag_without_effect_is_refused_where_it_is_given():
    values = flags.FlagValues()
    for name in ("fps", "seed"):
        flags.DEFINE(NumberParser(int, Range(0)), name, 1, "", flag_values=values)
    values(["program", "--fps=3"])
    check_used(values, {"seed": "x"})
    with pytest.raises(UserError, match="--fps has no effect here, it needs a video as --out"):
        check_used(values, {"fps": "a video as --out"})

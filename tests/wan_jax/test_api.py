"""Sampling from Python."""

import ast

import numpy as np
import pytest
from PIL import Image

import wan_jax
from wan_jax import api
from wan_jax.command_line import flag_source, limits
from wan_jax.errors import UserError
from wan_jax.inference.sampling import SampleRequest
from wan_jax.storage import media

SIZE = {"height": 32, "width": 48}


def drawn(count: int = 3) -> api.Videos:
    frames = np.arange(count, dtype=np.uint8)[:, None, None, None, None] * np.ones((1, 1, 4, 8, 3))
    return api.Videos(frames.astype(np.uint8), [f"number {i}" for i in range(count)])


def test_the_package_has_the_names_and_no_others():
    assert wan_jax.load is api.load and set(wan_jax.__all__) == {"load", "Model", "Videos"}
    with pytest.raises(AttributeError, match="lode"):
        wan_jax.lode  # noqa: B018


def test_ranges_and_choices_are_those_of_the_flags():
    source = flag_source.read("wan_jax.sample")
    assert source is not None
    known = {"media": media, **vars(limits)} | {
        name: getattr(wan_jax.choices, name) for name in dir(wan_jax.choices) if name.isupper()
    }
    numbers, choices = {}, {}
    for node in source.statements:
        call = node.value if isinstance(node, ast.Expr) else None
        if not isinstance(call, ast.Call) or ast.unparse(call.func) not in (
            "define_number",
            "flags.DEFINE_enum",
        ):
            continue
        name, _, third, *rest = (eval(ast.unparse(argument), {}, known) for argument in call.args)
        if ast.unparse(call.func) == "define_number":
            numbers[name] = rest
        else:
            choices[name] = tuple(third)
    assert {name: numbers[name][0] for name in api.RANGES} == api.RANGES
    assert {name for name in api.RANGES if int in numbers[name]} == set(api.WHOLE)
    solvers = choices.pop("solver")
    assert solvers == ("auto", *api.CHOICES["solver"])  # without one, it is the model's here too
    assert {name: choices[name] for name in choices} == {
        name: found for name, found in api.CHOICES.items() if name != "solver"
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stepz": 3}, "'stepz'.*steps"),
        ({"steps": 0}, "steps=0.*at least 1"),
        ({"steps": 2.0}, "steps=2.0.*whole"),
        ({"samples": True}, "samples=True"),
        ({"guidance": float("nan")}, "guidance=nan"),
        ({"dtype": 16}, "dtype=16"),
        ({"solver": "ode"}, "solver='ode'.*unipc"),
        ({"frames": 2}, "frames=2.*use 1"),
        ({"height": 30}, "height=30.*16"),
        ({"devices": 99}, "devices=99"),
        ({"guidance": 1.0, "negative_prompt": "dull"}, "negative_prompt='dull'.*guidance above 1"),
        ({"guidance_2": 2.0}, "guidance_2=2.0.*two experts"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_read(folders, options, message):
    with pytest.raises(UserError, match=message) as error:
        wan_jax.load(folders[1]).sample("sea", **SIZE | options)
    assert "\n" not in str(error.value)


def test_wrong_prompts_and_folders(folders, tmp_path):
    model = wan_jax.load(folders[1])
    assert repr(model) == f"Model({str(folders[1])!r})"
    for prompts in ([], "", ["sea", " "], [3]):
        with pytest.raises(UserError, match="prompts="):
            model.sample(prompts, **SIZE)
    with pytest.raises(UserError, match="nowhere"):
        wan_jax.load(tmp_path / "nowhere")


def test_videos_are_checked_saved_and_shown(tmp_path):
    videos = drawn()
    files = videos.save(tmp_path / "new" / "a.png", scale=2)
    assert [file.name for file in files] == ["a_000.png", "a_001.png", "a_002.png"]
    assert np.asarray(Image.open(files[2])).tolist() == np.full((8, 16, 3), 2).tolist()
    assert videos.sheet(2, 8).shape == (2 * (8 + 2) + 2, 2 * (16 + 2) + 2, 3)
    assert videos._repr_png_().startswith(b"\x89PNG")
    n, t, h, w, _ = videos.frames.shape
    assert f"{n} of {t} x {h} x {w}" in repr(videos) and len(repr(videos)) < 100
    with pytest.raises(UserError, match=r"a\.jpg"):
        videos.save(tmp_path / "a.jpg")
    for frames, prompts, message in (
        (videos.frames, ["a"], "3 videos"),
        (videos.frames / 2, ["a"] * 3, "float64"),
        (videos.frames[0], ["a"], "N, T, H, W, 3"),
    ):
        with pytest.raises(UserError, match=message):
            api.Videos(frames, prompts)


@pytest.mark.slow
def test_sampling_gives_the_videos_of_each_prompt(folders, monkeypatch):
    """The same ones whatever the batch; one that is not finite is warned of."""
    model = wan_jax.load(folders[1])
    videos = model.sample(["sea", "sky"], samples=2, steps=2, seed=5, **SIZE)
    assert videos.prompts == ["sea", "sea", "sky", "sky"] and videos.fps == 16
    assert videos.frames.shape == (4, 1, 32, 48, 3) and videos.finite.all()
    again = model.sample(["sea", "sky"], samples=2, steps=2, seed=5, batch_size=8, **SIZE)
    difference = np.abs(videos.frames.astype(int) - again.frames)
    assert difference.max() <= 1  # another batch rounds differently, at most by one level
    noise = SampleRequest.initial_noise
    monkeypatch.setattr(
        SampleRequest, "initial_noise", lambda self, rows: noise(self, rows).at[1].set(np.nan)
    )
    with pytest.warns(UserWarning, match="1 of 2"):
        broken = model.sample("sea", samples=2, steps=2, **SIZE)
    assert broken.finite.tolist() == [True, False]

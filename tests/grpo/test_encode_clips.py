"""`python -m grpo.encode_clips`: what it writes, that it continues, and what is refused."""

import dataclasses
import json
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from convert.from_diffusers import convert
from grpo import encode_clips
from grpo.data import latent_folder
from grpo.data.latent_folder import MANIFEST, open_data
from grpo.encode_clips import Wanted, encode
from tests import commands, tiny
from wan_jax.errors import UserError
from wan_jax.inference import pipeline
from wan_jax.inference.encoding import make_video_encoder
from wan_jax.inference.settings import Given
from wan_jax.storage import media, model_dir

WORDS = ("sea", "sky", "sun")


@pytest.fixture
def src(tmp_path):
    """A folder with three pictures of 16 x 32 and their captions."""
    folder = tmp_path / "src"
    folder.mkdir()
    for i, word in enumerate(WORDS):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 32, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{word}.png")
        (folder / f"{word}.txt").write_text(f'A sign that says "{word}".')
    return folder


@pytest.fixture
def wanted(model, src, tmp_path):
    return Wanted(str(model), str(tmp_path / "out"), str(src), height=16, width=32, batch_size=2)


def reference(model, pixels):
    """Return the normalised mean of the posterior of videos uint8 [B, T, H, W, 3], in float64."""
    opened = model_dir.open_model(model)
    vae = nnx.merge(*model_dir.build("vae", opened))
    mean, _ = jax.jit(lambda x: vae.encode(x))(jnp.asarray(pixels, jnp.float32) * (2 / 255) - 1)
    config = opened.config("vae")
    return (np.asarray(mean, np.float64) - config.latents_mean) / np.array(config.latents_std)


def test_latents_and_prompts_of_pictures(wanted, model, src, capsys):
    (src / "film.txt").write_text("a film")  # of film.mov, which is not read
    encode(wanted)
    out = capsys.readouterr().out
    assert "3 of 3 to encode" in out and "e.g. film.txt" in out
    opened = model_dir.open_model(model)
    data = open_data(wanted.out, opened)
    assert [item.name for item in data.items] == ["sea.png", "sky.png", "sun.png"]
    assert data.shape == (1, 2, 4, 16) and len(data) == 3 and data.kind.fps is None
    pixels = np.stack([np.asarray(Image.open(src / f"{word}.png"))[None] for word in WORDS])
    # float32 sums of some hundred products
    np.testing.assert_allclose(
        data.latents(np.arange(3)), reference(model, pixels), rtol=1e-4, atol=1e-5
    )
    np.testing.assert_array_equal(
        data.latents(np.array([2, 0])), data.latents(np.arange(3))[[2, 0]]
    )
    prompts = [f'A sign that says "{word}".' for word in WORDS]
    assert [item.prompt for item in data.items] == prompts
    table = pipeline.embed_prompts(opened, prompts)
    for ours, rows in zip(data.texts(), table.prompts):
        np.testing.assert_allclose(ours, rows, rtol=1e-5, atol=1e-6)  # other shapes of batches
    assert data.text_rows == max(map(len, table.prompts))


def test_a_second_run_encodes_what_is_new(wanted, model, src, capsys, monkeypatch):
    encode(wanted)
    opened = model_dir.open_model(model)
    first = open_data(wanted.out, opened)
    before = first.latents(np.arange(3))
    capsys.readouterr()

    encode(wanted)
    assert "0 of 3 to encode" in capsys.readouterr().out
    assert open_data(wanted.out, opened).digest == first.digest

    # one caption and one file change, one file is removed, one is new
    (src / "sea.txt").write_text('A sign that says "tide".')
    (src / "sun.png").unlink()
    Image.fromarray(np.zeros((16, 32, 3), np.uint8)).save(src / "sky.png")
    Image.fromarray(np.full((20, 40, 3), 255, np.uint8)).save(src / "moon.png")
    (src / "moon.txt").write_text("moon")
    encode(wanted)
    printed = capsys.readouterr().out
    assert "3 of 3 to encode" in printed and "3 that are not in the source any more" in printed
    data = open_data(wanted.out, opened)
    assert [(i.name, i.prompt, i.shard) for i in data.items] == [
        ("moon.png", "moon", 1),
        ("sea.png", 'A sign that says "tide".', 1),
        ("sky.png", 'A sign that says "sky".', 1),
    ]
    assert data.digest != first.digest
    after = data.latents(np.arange(3))
    np.testing.assert_allclose(after[1], before[0], rtol=1e-4, atol=1e-5)
    assert np.abs(after[2] - before[1]).max() > 0.1, "the file's new content"


def test_latents_that_are_not_finite_are_not_written(wanted, model, monkeypatch):
    def encoder(*_):
        return lambda state, videos: np.full((len(videos), 1, 2, 4, 16), np.nan, np.float32)

    monkeypatch.setattr(encode_clips, "make_video_encoder", encoder)
    with pytest.raises(UserError, match=r"sea\.png: its latents are not finite"):
        encode(wanted)
    with pytest.raises(UserError):
        open_data(wanted.out, model_dir.open_model(model))


def test_a_run_that_was_killed_goes_on(wanted, model, monkeypatch, capsys):
    """After one shard of two items: the rest is encoded, and what was complete is not changed."""
    monkeypatch.setattr(encode_clips, "SHARD", 2)
    encode(wanted)
    opened = model_dir.open_model(model)
    whole = open_data(wanted.out, opened)
    assert [item.shard for item in whole.items] == [0, 0, 1]

    killed = dataclasses.replace(wanted, out=wanted.out + "_killed")
    add, done = latent_folder.Writer.add, []

    def first_only(self, *args):
        if done:
            (self.folder / "00001_latents.npy").write_bytes(b"half of it")
            raise KeyboardInterrupt
        done.append(add(self, *args))

    monkeypatch.setattr(latent_folder.Writer, "add", first_only)
    with pytest.raises(KeyboardInterrupt):
        encode(killed)
    monkeypatch.setattr(latent_folder.Writer, "add", add)
    capsys.readouterr()
    encode(killed)
    assert "1 of 3 to encode" in capsys.readouterr().out
    data = open_data(killed.out, opened)
    assert [item.name for item in data.items] == [item.name for item in whole.items]
    np.testing.assert_array_equal(data.latents(np.arange(2)), whole.latents(np.arange(2)))
    np.testing.assert_allclose(
        data.latents(np.array([2])), whole.latents(np.array([2])), rtol=1e-4, atol=1e-5
    )


@pytest.fixture(scope="module")
def ti2v(tmp_path_factory):
    """A tiny model with the VAE of Wan 2.2 TI2V-5B."""
    folder = tmp_path_factory.mktemp("ti2v")
    source = tiny.write_pipeline(folder / "source", seed=4, ti2v=True)
    convert(str(source), folder / "model", "float32")
    return folder / "model"


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, shape, cells",
    [("model", (9, 16, 32), (2, 4, 16)), ("ti2v", (9, 32, 64), (2, 4, 48))],
)
def test_videos_of_both_vaes(request, kind, shape, cells, tmp_path):
    """A GIF, whose frames have no loss here, alone and by chunks of one latent frame."""
    model, src = request.getfixturevalue(kind), tmp_path / "src"
    src.mkdir()
    greys = np.random.default_rng(1).integers(0, 256, (*shape, 1), np.uint8).repeat(3, -1)
    media.write_video(src / "a.gif", greys, 10)
    (src / "a.txt").write_text("grey")
    wanted = Wanted(
        str(model),
        str(tmp_path / "out"),
        str(src),
        frames=5,
        height=shape[1],
        width=shape[2],
        given=Given(fps=5),
    )
    encode(wanted)
    opened = model_dir.open_model(model)
    data = open_data(wanted.out, opened)
    assert data.shape == (2, *cells) and data.kind.fps == 5
    expected = reference(model, greys[None, ::2])
    np.testing.assert_allclose(data.latents(np.array([0])), expected, rtol=1e-4, atol=2e-5)
    graph, state = model_dir.build("vae", opened)
    run = make_video_encoder(graph, opened.config("vae"), chunk=1)
    np.testing.assert_allclose(run(state, greys[None, ::2]), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.slow
def test_samples_of_the_model(model, tmp_path, capsys):
    """Two prompts in turn; a sample depends on its number only, and guidance makes a difference."""
    (tmp_path / "p.txt").write_text("sea\nsky\n")
    common = Wanted(
        str(model),
        str(tmp_path / "a"),
        samples=3,
        prompts=str(tmp_path / "p.txt"),
        height=16,
        width=32,
        given=Given(steps=2, guidance=3.0),
    )
    encode(common)
    opened = model_dir.open_model(model)
    data = open_data(common.out, opened)
    assert [(i.name, i.prompt) for i in data.items] == [
        ("sample_000000", "sea"),
        ("sample_000001", "sky"),
        ("sample_000002", "sea"),
    ]
    table = pipeline.embed_prompts(opened, ["sea", "sky", "sea"])
    for ours, rows in zip(data.texts(), table.prompts):
        np.testing.assert_allclose(ours, rows, rtol=1e-5, atol=1e-6)  # other shapes of batches
    latents = data.latents(np.arange(3))
    assert np.abs(latents[2] - latents[0]).max() > 0.1, "another noise"

    encode(dataclasses.replace(common, samples=5))  # goes on
    assert "2 of 5 to encode" in capsys.readouterr().out
    whole = dataclasses.replace(common, samples=5, out=str(tmp_path / "b"))
    encode(whole)
    again = [open_data(out, opened).latents(np.arange(5)) for out in (common.out, whole.out)]
    np.testing.assert_allclose(*again, rtol=1e-4, atol=1e-4)  # other sizes of batches

    plain = dataclasses.replace(common, out=str(tmp_path / "c"), given=Given(steps=2, guidance=1.0))
    encode(plain)
    assert np.abs(open_data(plain.out, opened).latents(np.arange(3)) - latents).max() > 0.01


# --- what is refused ------------------------------------------------------------------------------


def message(wanted, **changes) -> str:
    with pytest.raises(UserError) as error:
        encode(dataclasses.replace(wanted, **changes))
    return str(error.value)


def test_settings_that_are_refused(wanted, tmp_path):
    assert "--src=None" in message(wanted, src=None)
    assert "--from_model=2" in message(wanted, samples=2)
    assert "needs a file of prompts" in message(wanted, src=None, samples=2)
    assert "height=20" in message(wanted, height=20)
    assert "frames=4" in message(wanted, frames=4)
    assert "is a picture" in message(wanted, frames=5)
    assert not (tmp_path / "out" / MANIFEST).exists()


def test_folders_that_are_refused(wanted, model, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    assert "thesis.txt" in message(wanted)
    (tmp_path / "out" / "thesis.txt").unlink()
    encode(wanted)
    assert "width 32, now 48" in message(wanted, width=48)
    assert "source files, now samples" in message(
        wanted, src=None, samples=1, prompts=str(tmp_path / "src/sea.txt")
    )
    path = tmp_path / "out" / "00000_latents.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert "00000_latents.npy differs" in message(wanted)
    with pytest.raises(UserError) as error:
        open_data(wanted.out, model_dir.open_model(model))
    assert "00000_latents.npy differs" in str(error.value)


def test_data_of_another_model_is_refused(wanted, model, tmp_path):
    """By VAE, text encoder and tokenizer: the transformer does not matter."""
    encode(wanted)
    opened = model_dir.open_model(model)
    files = opened.manifest["files"]

    def changed(part):
        name = next(n for n in files if n.startswith(part) and "/params/" not in n)
        return dataclasses.replace(
            opened, manifest=opened.manifest | {"files": files | {name: (1, 2)}}
        )

    assert len(open_data(wanted.out, changed("transformer"))) == 3
    for part in ("vae", "text_encoder", "tokenizer"):
        with pytest.raises(UserError) as error:
            open_data(wanted.out, changed(part))
        assert f"config.data.path={wanted.out}" in str(error.value)
        assert "another VAE or text encoder" in str(error.value)


def test_folders_that_are_no_data(model, tmp_path):
    opened = model_dir.open_model(model)
    for folder, key in ((tmp_path / "none", "does not exist"), (tmp_path, MANIFEST)):
        with pytest.raises(UserError) as error:
            open_data(folder, opened)
        assert key in str(error.value) and "grpo.encode_clips" in str(error.value)


def test_an_empty_folder_of_data_and_another_format(wanted, model, tmp_path):
    encode(wanted)
    path = tmp_path / "out" / MANIFEST
    content = json.loads(path.read_text())
    files = {name: tuple(entry) for name, entry in content["files"].items()}
    values = {key: content[key] for key in ("format", "kind", "items")}
    for change, key in (({"items": []}, "has no item"), ({"format": 9}, "format 9")):
        latent_folder.integrity.write_manifest(path, values | change, files)
        with pytest.raises(UserError) as error:
            open_data(wanted.out, model_dir.open_model(model))
        assert key in str(error.value)


@pytest.mark.slow
def test_the_command(wanted):
    flags = ("--height=16", "--width=32", f"--src={wanted.src}", f"--out={wanted.out}")

    def run(*more):
        return subprocess.run(
            commands.command("grpo.encode_clips", f"--model={wanted.model}", *flags, *more),
            capture_output=True,
            text=True,
            env=commands.environment(),
            check=False,
        )

    done = run()
    assert done.returncode == 0 and "3 items of 1 x 16 x 32" in done.stdout, done.stderr
    done = run("--steps=4")
    assert done.returncode == 1 and "--steps has no effect" in done.stderr
    assert done.stderr.count("\n") == 1

"""A selection of `benchmarks.damage`, and that digests cover every file of a model folder."""

import collections
import dataclasses
import json

import pytest
from safetensors import safe_open

from benchmarks import damage
from convert import export_lora, to_diffusers
from convert.from_diffusers import convert
from tests import tiny
from wan_jax.command_line.cli import UserError
from wan_jax.storage import array_store, integrity, model_dir


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    root = tmp_path_factory.mktemp("damage")
    convert(str(tiny.write_pipeline(root / "source", seed=3)), root / "converted", "float32")
    return damage.Subject.make(root, root / "converted")


def test_the_outcomes_are_told_apart(tmp_path):
    path = tmp_path / "some/folder/file"

    def raising(error):
        def read():
            raise error

        return read

    assert damage.outcome(lambda: "a", "a", path)[0] == "same values"
    assert damage.outcome(lambda: "b", "a", path)[0] == "SILENT"
    assert damage.outcome(raising(KeyError("x")), "a", path)[0] == "TRACEBACK"
    assert damage.outcome(raising(UserError("something is wrong")), "a", path)[0] == "TRACEBACK"
    assert damage.outcome(raising(UserError(f"{path} is damaged")), "a", path)[0] == "message"


@pytest.mark.slow
def test_every_file_of_a_model_has_a_digest(subject):
    """Except the manifest, which has its own, cached prompts, which have theirs, and what nobody
    reads.
    """
    files = model_dir.open_model(subject.model).manifest["files"]
    left_out = {"wan_jax.json"} | {
        f"{c}/params/{name}" for c in model_dir.COMPONENTS for name in array_store.TIMES
    }
    there = {str(path.relative_to(subject.model)) for path in damage.files_of(subject.model)}
    assert {name for name in there if not name.startswith("text_cache/")} - left_out == files.keys()
    assert integrity.problem(subject.model, files) is None


@pytest.mark.slow
def test_damage_is_one_message_or_harmless(subject):
    """One kind of damage a file, all kinds in turn, of every file outside the arrays and of some
    arrays.
    """
    chosen = [
        (kind, path, name, read)
        for kind, path, name, read in damage.subjects(subject, arrays=1, seed=0)
        if kind
        in ("reward head", "model, small files", "model, text_encoder", "checkpoint digests.json")
    ]
    counts, wanted = collections.Counter(), {}
    for i, (kind, path, name, read) in enumerate(chosen):
        wanted.setdefault((kind, name), read())
        kinds = damage.damages(path)
        for how in (list(kinds)[i % len(kinds)], list(kinds)[-1 - i % 3]):
            with damage.damaged(path, kinds[how]):
                found, said = damage.outcome(read, wanted[kind, name], path)
            assert found in ("message", "same values"), (path, how, said)
            counts[found] += 1
    assert counts["message"] > 2 * counts["same values"] > 0


def test_another_model_is_refused_and_a_moved_one_is_not(subject, tmp_path):
    source = tiny.write_pipeline(tmp_path / "source", seed=4)
    convert(str(source), tmp_path / "other", "float32")
    opened, other = model_dir.open_model(subject.model), model_dir.open_model(tmp_path / "other")
    subject.model.rename(tmp_path / "moved")
    try:
        assert (
            model_dir.open_model(tmp_path / "moved").fingerprint
            == opened.fingerprint
            != other.fingerprint
        )
    finally:
        (tmp_path / "moved").rename(subject.model)
    changed = dataclasses.replace(subject, model=other.path)
    for read in (changed.resume, changed.sample, changed.export, changed.load_head):
        with pytest.raises(
            UserError, match=f"trained on .*{opened.fingerprint[:12]}.*{other.path}"
        ) as caught:
            read()
        assert other.fingerprint[:12] in str(caught.value)


def test_exports_name_their_model(subject, tmp_path):
    (lora_file,) = export_lora.export(subject.run, subject.model, tmp_path / "lora").values()
    to_diffusers.export(subject.model, tmp_path / "exported", checkpoint=str(subject.run))
    merged = tmp_path / "exported/transformer/diffusion_pytorch_model.safetensors"
    for path in (lora_file, merged):
        with safe_open(path, "numpy") as file:
            assert (
                file.metadata()["wan_jax_model"] == model_dir.open_model(subject.model).fingerprint
            )


def test_a_model_of_an_earlier_version_is_read_and_said_to_have_no_digests(subject, capsys):
    """And what can be seen without digests is one message."""
    wanted = [subject.load("text_encoder"), subject.small_files()]
    path = subject.model / model_dir.MANIFEST
    old = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("files", "sha256")}
    with damage.damaged(path, lambda: path.write_text(json.dumps(old))):
        assert model_dir.open_model(subject.model).fingerprint is None
        assert "without digests" in capsys.readouterr().out
        assert [subject.load("text_encoder"), subject.small_files()] == wanted
        params = subject.model / "text_encoder/params"
        for name in (
            "transformer/config.json",
            "text_encoder/config.json",
            "scheduler/scheduler_config.json",
            "tokenizer/tokenizer.json",
            "text_encoder/params/_METADATA",
            str(
                next(p for p in damage.files_of(params) if p.name == "0.0").relative_to(
                    subject.model
                )
            ),
            str(
                next(p for p in damage.files_of(params) if p.name == ".zarray").relative_to(
                    subject.model
                )
            ),
        ):
            for how in ("removed", "halved"):
                victim = subject.model / name
                read = (
                    subject.small_files
                    if "params" not in name
                    else lambda: subject.load("text_encoder")
                )
                with damage.damaged(victim, damage.damages(victim)[how]):
                    assert damage.outcome(read, "", victim)[0] == "message", (name, how)

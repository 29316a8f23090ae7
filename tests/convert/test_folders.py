"""Tests of `whole_folder`: a folder appears complete or not at all, also after a kill."""

import os

import pytest

from convert.folders import whole_folder
from wan_jax.errors import UserError
from wan_jax.storage import model_dir


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def write(folder, text):
    for name in ("model_index.json", "part/a", "part/b"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)


def replace(folder, text, resumable):
    with whole_folder(folder, True, resumable=resumable) as partial:
        write(partial, text)


def killed_at(step, folder, resumable):
    """Replace the folder in a child process that dies before its file operation number `step`;
    return whether it did.
    """
    if (child := os.fork()) == 0:
        count = 0

        def dying(operation):
            def operate(*args, **kwargs):
                nonlocal count
                count += 1
                if count == step:
                    os._exit(9)
                return operation(*args, **kwargs)

            return operate

        for name in ("rename", "unlink", "rmdir", "replace"):
            setattr(os, name, dying(getattr(os, name)))
        try:
            replace(folder, "new", resumable)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def test_overwrite_replaces_models_only(tmp_path):
    (tmp_path / "models" / "mine").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    for name in ("models", "file"):
        with (
            pytest.raises(UserError, match=rf"{name} exists and is not a model folder"),
            whole_folder(tmp_path / name, True),
        ):
            pass
    assert (tmp_path / "models" / "mine").is_dir()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork.*")
@pytest.mark.parametrize("resumable", [True, False])
def test_a_complete_copy_survives_a_kill_at_every_step(tmp_path, resumable):
    whole = {
        text: dict.fromkeys(("model_index.json", "part/a", "part/b"), text.encode())
        for text in ("old", "new")
    }
    killed, step, seen = True, 0, set()
    while killed:
        step += 1
        folder = tmp_path / str(step) / "model"
        folder.mkdir(parents=True)
        write(folder, "old")
        killed = killed_at(step, folder, resumable)
        kept = folder if folder.exists() else model_dir.previous_folder(folder)
        assert contents(kept) in whole.values()
        seen.add(kept.name)
        if kept != folder:
            with pytest.raises(UserError, match=rf"stopped half-way.*complete in {kept}"):
                model_dir.open_model(folder)
        with pytest.raises(UserError, match="exists already"), whole_folder(folder, False):
            pass
        assert contents(folder) in whole.values()
        replace(folder, "new", resumable)
        assert contents(folder) == whole["new"] and [p.name for p in folder.parent.iterdir()] == [
            "model"
        ]
    assert step > 5 and seen == {"model", ".model.previous"}


def test_a_destination_that_appears_meanwhile_is_kept(tmp_path):
    model = tmp_path / "model"
    with (
        pytest.raises(UserError, match="exists already"),
        whole_folder(model, False, resumable=True) as new,
    ):
        write(new, "new")
        model.mkdir()
        write(model, "other")
    assert contents(new)["part/a"] == b"new" and contents(model)["part/a"] == b"other"

"""What a checkpoint does about damage to any of its files."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from wan_jax.command_line.cli import UserError
from wan_jax.storage.checkpoint import Checkpoints, find
from wan_jax.storage.trained_weights import load_trained, used_single_expert

TRAINED = {"a/kernel": jnp.arange(12.0).reshape(3, 4), "b": jnp.ones(5)}
STATE = {
    "trainable": {k: v + 1 for k, v in TRAINED.items()},
    "opt": {"0": jnp.zeros((), jnp.int32)},
    "counters": {"updates": jnp.int32(3)},
}
META = {"config": {}, "experts": ["transformer"], "lora": None, "model": "models/some"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run folder with checkpoints 1 and 2."""
    run = tmp_path_factory.mktemp("saved") / "run"
    for epoch in (1, 2):
        Checkpoints(run).save(epoch, STATE, TRAINED, META)
    return run


@pytest.fixture
def run(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


def write_format_1(run, epoch):
    """A checkpoint as the first format has it: no digests, and the moving average in the state too."""
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    with ocp.CheckpointManager(run.absolute() / "checkpoints", options=options) as manager:
        manager.save(
            epoch,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(STATE | {"ema": TRAINED}),
                trained=ocp.args.StandardSave(TRAINED),
                meta=ocp.args.JsonSave(META | {"format": 1, "epoch": epoch}),
            ),
        )


def resume(run):
    """What training does, and sampling."""
    checkpoints = Checkpoints(run)
    epoch = checkpoints.latest()
    checkpoints.check(epoch)
    restored = checkpoints.restore_state(epoch, STATE | {"ema": TRAINED})
    return epoch, restored, load_trained(run)[1]


def assert_whole(found, epoch):
    at, (state, trained), sampled = found
    assert at == epoch
    for part in STATE:
        for name, value in STATE[part].items():
            np.testing.assert_array_equal(state[part][name], value)
    for name, value in TRAINED.items():
        np.testing.assert_array_equal(trained[name], value)
        np.testing.assert_array_equal(sampled["transformer"][name], value)


def test_a_checkpoint_comes_back_and_holds_the_average_once(run):
    assert_whole(resume(run), 2)
    assert not any("ema" in key for key in Checkpoints(run).load_trained(2))
    tree = ocp.StandardCheckpointer().metadata(run / "checkpoints/2/state").item_metadata.tree
    assert tree.keys() == STATE.keys()


def test_weights_that_an_earlier_version_stored_twice_are_read(run):
    """Of a run without an average, whose state has the weights of the other part again."""
    like = {key: value for key, value in STATE.items() if key != "trainable"} | {"ema": TRAINED}
    state, trained = Checkpoints(run).restore_state(2, like)
    assert state.keys() == like.keys() - {"ema"}
    for name, value in TRAINED.items():
        np.testing.assert_array_equal(trained[name], value)


def test_a_checkpoint_whose_folder_is_moved_away_during_the_save_is_not_finished(run, monkeypatch):
    """Between its two parts."""
    parts, prepare = [], ocp.args.StandardSave

    def move_before_the_second(tree):
        if parts:
            run.rename(run.with_name("moved"))
        parts.append(tree)
        return prepare(tree)

    monkeypatch.setattr(ocp.args, "StandardSave", move_before_the_second)
    with pytest.raises(FileNotFoundError):
        Checkpoints(run).save(3, STATE, TRAINED, META)
    assert Checkpoints(run).epochs() == [] and Checkpoints(run.with_name("moved")).latest() == 2


def test_a_checkpoint_of_the_first_format_comes_back_and_says_what_it_lacks(tmp_path, capsys):
    write_format_1(tmp_path, 3)
    assert_whole(resume(tmp_path), 3)
    assert "without digests" in capsys.readouterr().out


def damages(path):
    """{name: what does it}: every kind of damage to one file."""
    content = path.read_bytes()

    def replace(by):
        return lambda: path.write_bytes(by)

    def folder():
        path.unlink()
        path.mkdir()

    flips = {
        f"bit {at}": replace(content[:at] + bytes([content[at] ^ 16]) + content[at + 1 :])
        for at in {0, len(content) // 2, len(content) - 1}
        if content
    }
    return {
        "deleted": path.unlink,
        "folder": folder,
        "halved": replace(content[: len(content) // 2]),
        "longer": replace(content + b"\0"),
        "garbage": replace(b'{"a": ['),
    } | flips


@pytest.mark.slow
def test_every_damage_to_every_file_is_one_message_or_harmless(run):
    """All that is in the folder, whatever wrote it."""
    paths = [p for p in sorted((run / "checkpoints/2").rglob("*")) if p.is_file()]
    assert len(paths) > 10
    for path in paths:
        content = path.read_bytes()
        for how, damage in damages(path).items():
            damage()
            try:
                assert_whole(resume(run), 2)
                assert path.name == "digests.json" and how.startswith("bit"), f"{path} {how} passed"
            except UserError as error:
                message = str(error)
                assert len(message.splitlines()) == 1, (path, how)
                assert message.startswith(str(run / "checkpoints/2")), (path, how)
                assert f"--checkpoint={run / 'checkpoints/1'}" in message, (path, how)
            if path.is_dir():
                path.rmdir()
            path.write_bytes(content)


@pytest.mark.slow
@pytest.mark.parametrize("item", ["state", "trained", "meta"])
def test_damage_to_the_first_format_is_one_message(tmp_path, item):
    write_format_1(tmp_path / "old", 1)
    write_format_1(tmp_path / "old", 2)
    for how in ("deleted", "no manifest", "empty"):
        run = shutil.copytree(tmp_path / "old", tmp_path / "run")
        folder = run / "checkpoints/2" / item
        if how == "deleted":
            shutil.rmtree(folder)
        elif how == "no manifest":
            (folder / ("metadata" if item == "meta" else "manifest.ocdbt")).unlink()
        else:
            for path in folder.rglob("*"):
                if path.is_file():
                    path.write_bytes(b"")
        with pytest.raises(UserError, match=r"checkpoints/2 .*checkpoints/1\b"):
            resume(run)
        shutil.rmtree(run)


@pytest.mark.parametrize("what", ["empty", "foreign", "file", "cut off", "later format"])
def test_a_newer_folder_that_is_no_checkpoint_is_named(run, what):
    folder = run / "checkpoints/9"
    if what == "file":
        folder.write_text("")
    elif what == "cut off":
        shutil.copytree(run / "checkpoints/2", folder)
        (folder / "digests.json").unlink()
    elif what == "later format":
        shutil.copytree(run / "checkpoints/2", folder)
        (folder / "digests.json").unlink()
        (folder / "meta/metadata").write_text(json.dumps(META | {"format": 9, "epoch": 9}))
    else:
        folder.mkdir()
        (folder / "notes.txt").write_text("") if what == "foreign" else None
    with pytest.raises(
        UserError, match=rf"{folder} .*remove {folder} .*--checkpoint={run}/checkpoints/2$"
    ):
        resume(run)
    assert_whole(
        (
            2,
            Checkpoints(run).restore_state(2, STATE | {"ema": TRAINED}),
            load_trained(run / "checkpoints/2")[1],
        ),
        2,
    )


def test_the_checkpoint_that_is_named_was_read(run):
    """Of three the two newest are damaged; where none is whole, that is said."""
    Checkpoints(run).save(3, STATE, TRAINED, META)
    for epoch in (2, 3):
        (run / f"checkpoints/{epoch}/trained/manifest.ocdbt").write_bytes(b"")
    with pytest.raises(UserError, match=r"remove \S+/2 and \S+/3 .*--checkpoint=\S+/1$"):
        resume(run)
    (run / "checkpoints/1/meta/metadata").unlink()
    with pytest.raises(UserError, match=r"--config\.run_dir") as caught:
        resume(run)
    assert "--checkpoint" not in str(caught.value)


def test_a_run_begins_where_nothing_is_in_the_way(tmp_path):
    assert Checkpoints(tmp_path / "run").begin() is None and (tmp_path / "run/checkpoints").is_dir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/checkpoints").write_text("")
    with pytest.raises(UserError, match=r"other/checkpoints is a file"):
        Checkpoints(tmp_path / "other").begin()
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):  # for which cli.run has a message
        Checkpoints(tmp_path / "file").begin()


def test_only_the_newest_stay_and_nothing_unfinished(run):
    (run / "checkpoints/.7.tmp").mkdir()
    (run / "checkpoints/7.orbax-checkpoint-tmp-12").mkdir()
    Checkpoints(run, keep=2).save(4, STATE, TRAINED, META)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["2", "4"]


def test_the_best_stays_and_is_found(run):
    with pytest.raises(UserError, match=r"best\.json names no checkpoint"):
        find(run / "best")
    single = META | {"config": {"model": {"single_expert": True}}}
    Checkpoints(run).mark_best(1, "why")
    for epoch in (4, 5):
        Checkpoints(run, keep=1).save(epoch, STATE, TRAINED, single)
    checkpoints = Checkpoints(run)
    assert checkpoints.epochs() == [1, 5] and checkpoints.best() == 1
    assert find(run / "best")[1] == 1 and find(run)[1] == 5
    assert used_single_expert(run) and not used_single_expert(run / "best")
    (run / "best.json").write_text("[]")  # damaged
    assert checkpoints.best() is None

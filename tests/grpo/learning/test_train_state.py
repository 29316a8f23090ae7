"""What a run may go on with: the settings, the model and the training prompts of its checkpoint."""

import pathlib

import pytest

from configs.defaults import defaults
from grpo.data.prompts import load_prompts
from grpo.learning import train_state
from rewards.base import PromptRecord
from rewards.ocr.targets import parse_targets
from wan_jax.command_line.cli import UserError
from wan_jax.storage.model_dir import ModelDir


def model(path="models/one", crc=1):
    return ModelDir(pathlib.Path(path), {"files": {"transformer/params/a/0": (4, crc)}}, {})


@pytest.fixture
def prompts(tmp_path):
    """Writes a prompt file and loads it."""

    def load(name, *words):
        (tmp_path / name).write_text("".join(f'A sign that says "{word}".\n' for word in words))
        return load_prompts(tmp_path / name, parse_targets)

    return load


def config(train, **changes):
    c = defaults()
    c.prompts.train, c.model.path = train, "models/one"
    c.train.update(changes)
    return c.to_dict()


def meta(prompts, of=None, **changes):
    return {
        "epoch": 1,
        "config": config("a.txt"),
        "model": "models/one",
        **train_state.origin(of or model(), prompts),
    } | changes


def test_the_content_of_the_training_prompts_counts(prompts):
    before, same, other = (
        prompts("a.txt", "open", "exit"),
        prompts("b.txt", "open", "exit"),
        prompts("c.txt", "open"),
    )
    train_state.check_resume(
        meta(before), "R/1", config("b.txt"), model(), train_state.origin(model(), same)
    )
    for name in ("a.txt", "c.txt"):
        with pytest.raises(
            UserError, match=r"R/1 was made with other settings \(prompts\.train: 'a\.txt \("
        ):
            train_state.check_resume(
                meta(before), "R/1", config(name), model(), train_state.origin(model(), other)
            )
    with pytest.raises(UserError, match=r"train\.adam_b1"):
        train_state.check_resume(
            meta(before),
            "R/1",
            config("a.txt", adam_b1=0.5),
            model(),
            train_state.origin(model(), before),
        )


def test_the_content_of_the_data_counts(prompts):
    """Their path does not; a checkpoint of an earlier version had none."""
    train = prompts("a.txt", "open")

    def resume(before, after, path):
        def settings(path):
            c = config("a.txt")
            c["data"]["path"] = path
            return c

        digests = [
            train_state.origin(model(), train) | {"data_digest": digest}
            for digest in (before, after)
        ]
        saved = meta(train) | digests[0] | {"config": settings("old")}
        train_state.check_resume(saved, "R/1", settings(path), model(), digests[1])

    resume("1234", "1234", "new")
    for path in ("old", "new"):
        with pytest.raises(UserError, match=rf"data\.path: 'old \(1234\)' -> '{path} \(5678\)'"):
            resume("1234", "5678", path)
    with pytest.raises(UserError, match=r"data\.path"):
        resume("1234", None, "")
    earlier = meta(train)
    del earlier["data_digest"], earlier["config"]["data"]
    same = train_state.origin(model(), train)
    assert train_state.check_resume(earlier, "R/1", config("a.txt"), model(), same) == ()
    with_data = same | {"data_digest": "1234"}
    with pytest.raises(UserError, match=r"data\.path"):
        train_state.check_resume(earlier, "R/1", config("a.txt"), model(), with_data)


def test_the_content_of_the_labels_counts(prompts):
    """Their path does not, as that of the data; a checkpoint of an earlier version had none."""
    same = train_state.origin(model(), prompts("a.txt", "open")) | {"data_digest": "12"}
    settings = {path: config("a.txt") for path in ("", "old", "new")}
    for path, values in settings.items():
        values["data"]["labels"] = path
    saved = meta(prompts("a.txt", "open")) | same | {"config": settings["old"]}
    labelled = [same | {"labels_digest": digest} for digest in ("34", "56")]
    saved |= labelled[0]
    train_state.check_resume(saved, "R/1", settings["new"], model(), labelled[0])
    with pytest.raises(UserError, match=r"data\.labels: 'old \(34\)' -> 'old \(56\)'"):
        train_state.check_resume(saved, "R/1", settings["old"], model(), labelled[1])
    del saved["labels_digest"], saved["config"]["data"]["labels"]
    train_state.check_resume(saved, "R/1", settings[""], model(), same)
    with pytest.raises(UserError, match=r"data\.labels"):
        train_state.check_resume(saved, "R/1", settings["old"], model(), labelled[0])


def test_targets_count_and_how_they_are_kept_does_not(prompts):
    before = prompts("a.txt", "open", "exit")
    asked = type(before)(before.prompts, tuple(map(PromptRecord, before.targets, before.prompts)))
    others = type(before)(before.prompts, (("other",), ("exit",)))
    digests = [train_state.origin(model(), p)["prompts_digest"] for p in (before, asked, others)]
    assert digests[0] == digests[1] != digests[2]


def test_a_checkpoint_without_digests_is_compared_by_name(prompts, capsys):
    now = prompts("a.txt", "open")
    old = meta(now, prompts_digest=None, model_digest=None)
    train_state.check_resume(old, "R/1", config("a.txt"), model(), train_state.origin(model(), now))
    assert "cannot be checked" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"prompts\.train: 'a\.txt' -> 'b\.txt'"):
        train_state.check_resume(
            old, "R/1", config("b.txt"), model(), train_state.origin(model(), now)
        )


def test_another_model_is_refused_and_a_moved_one_is_not(prompts):
    now = prompts("a.txt", "open")
    train_state.check_resume(
        meta(now),
        "R/1",
        config("a.txt"),
        model("elsewhere"),
        train_state.origin(model("elsewhere"), now),
    )
    other = model("models/two", crc=2)
    with pytest.raises(
        UserError,
        match=rf"models/one \({model().fingerprint[:12]}\), config.model.path is models/two "
        rf"\({other.fingerprint[:12]}\)",
    ):
        train_state.check_resume(
            meta(now), "R/1", config("a.txt"), other, train_state.origin(other, now)
        )

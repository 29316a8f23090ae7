"""Processes of a run that do not have the same folders, settings, prompts or weights."""

import socket
import subprocess

import pytest

from configs import tiny_ocr
from grpo.data.prompts import PromptSet
from grpo.settings import agreement
from tests import commands


def free_port() -> str:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])


def test_what_must_be_equal():
    prompts = PromptSet(("a", "b"), (("a",), ("b",)))
    c, changed = tiny_ocr.get_config(), tiny_ocr.get_config()
    facts = agreement.facts(c, {"prompts.train": prompts})
    assert facts["config.seed"] == repr(c.seed) and facts["prompts.train"].startswith(
        "2 prompts (SHA-256 "
    )
    assert (
        len(facts["the code of wan_jax, grpo, rewards, convert"]) > 20
        and "the version of jax" in facts
    )
    changed.reward.workers, changed.run_dir, changed.log.mlflow.uri = (
        9,
        "elsewhere",
        "http://user:password@host",
    )
    assert agreement.facts(changed, {"prompts.train": prompts}) == facts
    for other in (
        PromptSet(("b", "a"), prompts.targets),
        PromptSet(prompts.prompts, (("a",), ("c",))),
    ):
        assert (
            agreement.facts(c, {"prompts.train": other})["prompts.train"] != facts["prompts.train"]
        )


@pytest.mark.slow
def test_two_processes_that_differ(tmp_path):
    """All comparisons in one start; the last one ends both with the same message."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "wan_jax.json").write_text("{}")
    coordinator = f"127.0.0.1:{free_port()}"
    processes = [
        subprocess.Popen(
            commands.command("tests.grpo.agree_main", tmp_path, coordinator, i),
            env=commands.environment(devices=2),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for i in (0, 1)
    ]
    (out, err), other = [process.communicate(timeout=200) for process in processes]
    assert (out, err) == other and [process.returncode for process in processes] == [1, 1], (
        out,
        err,
        other,
    )
    said = out.splitlines()
    assert len(said) == 7, (said, err)
    assert [said[i] for i in (0, 4, 5)] == ["ok"] * 3, said
    assert (
        said[1].startswith(f"config.run_dir={tmp_path} of process 1 on ")
        and "not the folder of" in said[1]
    ), said
    assert said[2].startswith(f"config.model.path={tmp_path} of process 1 on "), said
    assert "differs from process 0 in config.train.learning_rate: 0.5 instead of" in said[3], said
    assert said[6].startswith("weights of process 1 differ from those of process 0 (1 of 2"), said
    assert err.startswith("error: process 1 on ") and "prompts.train: 2 prompts (SHA-256" in err, (
        err
    )

"""The command of the reward server: its settings, its errors, and how it stops."""

import contextlib
import signal
import socket
import subprocess
import sys
import threading
import urllib.parse

import pytest
from absl.testing import flagsaver

pytest.importorskip("fastapi")

import rewards.remote
from rewards import server
from rewards.ocr.rules import OCRReward
from rewards.ocr.two_readers import TwoReaderReward
from tests.rewards import pool_rewards
from tests.rewards.serving import ROOT, TOKEN, Command, ask, serving, wait_for


@pytest.mark.slow
def test_stopping_lets_requests_finish():
    results = []
    with (
        Command("--reward=tests.rewards.pool_rewards:Slow", "--workers=1", files=64) as command,
        contextlib.ExitStack() as stack,
    ):
        url = command.url()
        parts = urllib.parse.urlsplit(url)
        for _ in range(80):  # silent, and more than the server may open
            stack.enter_context(socket.create_connection((parts.hostname, parts.port)))
        thread = threading.Thread(target=lambda: results.append(ask(url)))
        thread.start()
        wait_for(lambda: ask(url, "GET", "/v1/health")[1]["queue"] == 2)
        assert command.kill(signal.SIGTERM) == 0
        thread.join()
        output = command.process.stdout.read() + command.process.stderr.read()
        assert TOKEN not in output and "Traceback" not in output and output.count("ulimit -n") == 1
    assert results[0][0] == 200 and results[0][1]["scores"][1]["value"] == 1


@pytest.mark.quick_cases(3)
@pytest.mark.parametrize(
    "flags, code, text",
    [
        (["--nope"], 1, "nope"),
        (["extra"], 1, "'extra'"),
        (["--workers=0"], 1, "--workers=0"),
        (["--rule=speling"], 1, "--rule=speling"),
        (["--batch=2"], 1, "--batch=2"),
        (["--name=va"], 1, "--name=va"),
        (
            ["--reward=tests.rewards.pool_rewards:Mean", "--batch=2", "--workers=1"],
            1,
            "score_batch",
        ),
        (["--reward=tests.rewards.own_rewards:Nothing", "--workers=1"], 1, "score_group"),
        (["--max_mib=9", "--max_memory_mib=8"], 1, "--max_memory_mib=8"),
        (["--reward=a:b", "--options=[1]"], 1, "--options=[1]"),
        (["--reward=a:b", "--options={"], 1, "--options={"),
        (["--reward=tests.rewards.pool_rewards:broken_factory", "--workers=1"], 1, "model file"),
        (["--host=0.0.0.0", "--token_env=NOT_SET"], 1, "--host=0.0.0.0"),
    ],
)
def test_an_error_of_the_user_is_one_line(flags, code, text, capfd):
    command = [sys.executable, "-m", "rewards.server", "--port=0", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == code and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and text in line


@pytest.mark.slow
def test_ctrl_c_before_the_server_is_ready_is_one_line():
    with Command("--reward=tests.rewards.pool_rewards:SlowToBuild", "--workers=1") as command:
        assert command.process.stderr.readline() == "building\n"
        assert command.kill(signal.SIGINT) == 130
        assert command.process.stdout.read() == ""
        assert command.process.stderr.read() == "\nstopped before the server was ready\n"


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    for name in ("application", "admission"):
        monkeypatch.delitem(sys.modules, f"rewards.remote.{name}", raising=False)
        monkeypatch.delattr(rewards.remote, name, raising=False)
    with pytest.raises(server.UsageError, match=r"uvicorn.*\[server\]"):
        server.main([])


# --- Settings -------------------------------------------------------------------------------------


def test_token(tmp_path, monkeypatch):
    monkeypatch.delenv("A_TOKEN", raising=False)
    assert server.read_token(None, "A_TOKEN", "127.0.0.1", False) == ""
    assert server.read_token(None, "A_TOKEN", "0.0.0.0", True) == ""
    for host in ("0.0.0.0", "::", "10.0.0.1", "cpu1"):
        with pytest.raises(server.UsageError, match=r"there is no token.*A_TOKEN.*--allow_all"):
            server.read_token(None, "A_TOKEN", host, False)
    monkeypatch.setenv("A_TOKEN", "of-the-environment")
    assert server.read_token(None, "A_TOKEN", "0.0.0.0", False) == "of-the-environment"
    path = tmp_path / "token"
    with pytest.raises(server.UsageError, match="cannot be read"):
        server.read_token(str(path), "A_TOKEN", "0.0.0.0", False)
    path.write_text(" \n")
    with pytest.raises(server.UsageError, match="is empty"):
        server.read_token(str(path), "A_TOKEN", "0.0.0.0", False)
    path.write_text("of-the-file\n")
    assert server.read_token(str(path), "A_TOKEN", "0.0.0.0", False) == "of-the-file"
    path.write_text("two words")
    with pytest.raises(server.UsageError, match="no HTTP header") as error:
        server.read_token(str(path), "A_TOKEN", "0.0.0.0", False)
    assert "two" not in str(error.value)


@pytest.mark.parametrize(
    "name, given",
    [("ocr", {"options": '{"rule": "confident"}'}), ("a:b", {"rule": "confident"})],
)
def test_a_flag_that_the_reward_does_not_read(name, given):
    server.check_used(name)
    with flagsaver.as_parsed(**given), pytest.raises(server.UsageError) as error:
        server.check_used(name)
    ((flag, value),) = given.items()
    assert f"--{flag}={value} " in str(error.value) and f"--reward={name}:" in str(error.value)


def test_two_readers_show_on_the_health_page():
    options = {"rule": "confident", "engine": "rapidocr", "max_frames": 3}
    factory, about = server.make_factory("ocr", options | {"reader_two": "paddleocr"})
    assert factory.func is TwoReaderReward and about["reader_two"] == "paddleocr"
    factory, about = server.make_factory("ocr", options)
    assert factory.func is OCRReward and "reader_two" not in about


def test_your_own_reward():
    factory, about = server.make_factory("tests.rewards.pool_rewards:Mean", {"folder": "/tmp"})
    assert isinstance(factory(), pool_rewards.Mean) and about == {
        "name": "tests.rewards.pool_rewards:Mean",
        "folder": "/tmp",
    }
    for name, options in (
        ("tests.rewards.pool_rewards", {}),
        ("tests.rewards.pool_rewards:Nothing", {}),
        ("no_such_module:Mean", {}),
        ("", {}),
        ("tests.rewards.pool_rewards:Mean", {"fodler": "/tmp"}),
    ):
        with pytest.raises(server.UsageError, match="on PYTHONPATH"):
            server.make_factory(name, options)


def test_a_port_in_use():
    with serving() as url:
        with pytest.raises(server.UsageError, match="choose another --port"):
            server.bind("127.0.0.1", urllib.parse.urlsplit(url).port)

"""What a user sees when the disk is the problem."""

import errno
import gc
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest

from wan_jax.command_line import cli
from wan_jax.command_line.cli import UserError, check_space, disk_error, interrupt
from wan_jax.distributed import multihost
from wan_jax.storage.checkpoint import Checkpoints


def test_errors_of_the_disk_are_found_in_the_chain_of_causes():
    inner = OSError(errno.ENOSPC, "No space left on device", "/x/y")
    outer = RuntimeError("orbax gave up")
    outer.__cause__ = inner
    assert disk_error(outer) is inner
    assert disk_error(RuntimeError("something else")) is None
    assert disk_error(OSError(errno.ENOENT, "no such file")) is None


def test_a_file_in_the_way_of_a_folder_and_a_folder_in_the_way_of_a_file(tmp_path):
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.touch()
    folder.mkdir()
    for raises, path in (
        (lambda: file.mkdir(exist_ok=True), file),
        (lambda: os.replace(file, folder), folder),
        (lambda: folder.write_text(""), folder),
    ):
        with pytest.raises(OSError) as caught:
            raises()
        message, code = cli.explain(caught.value)
        assert (
            code == 1
            and message.startswith(f"error: {path}: ")
            and "choose another folder" in message
        )
    with pytest.raises(FileExistsError) as caught:
        folder.mkdir()
    assert cli.explain(caught.value) is None


def test_ctrl_c_in_a_callback_that_loses_exceptions_is_raised_after_it():
    class Loses:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            Loses()
            time.sleep(5)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
        cli.interrupted.clear()


SWALLOWS = """
import atexit, os, signal
atexit.register(os.abort)  # as XLA may, when it is torn down while it compiles
from wan_jax.command_line import cli

def main(_):
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        raise ImportError("initialization failed")  # as an extension module that is interrupted while it loads

cli.run(main)
"""


def test_ctrl_c_that_a_library_lost_counts_at_the_next_stage():
    multihost.stage("one")
    cli.interrupted.set()
    try:
        with pytest.raises(KeyboardInterrupt):
            multihost.stage("another")
    finally:
        cli.interrupted.clear()


def test_ctrl_c_that_became_another_error_is_still_ctrl_c():
    done = subprocess.run(
        [sys.executable, "-c", SWALLOWS], capture_output=True, text=True, check=False
    )
    assert done.returncode == 130 and "stopped" in done.stderr and "Traceback" not in done.stderr, (
        done.stderr
    )


@pytest.mark.parametrize(
    "message",
    [
        "RESOURCE_EXHAUSTED: Error writing: No space left on device [os_error_code='28']",
        "Error while serializing: I/O error: No space left on device (os error 28)",
    ],
)
def test_errors_that_only_name_the_systems_number(message):
    """tensorstore's and safetensors' wording."""
    assert disk_error(ValueError(message)).errno == errno.ENOSPC


@pytest.mark.slow
def test_an_error_in_a_save_is_raised_and_not_printed_too(tmp_path, monkeypatch, capfd, caplog):
    """Orbax prints it in each of its threads; here because files may have 2000 bytes only, as on a
    full disk.
    """
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    arrays = {f"a{i}": jnp.asarray(np.random.default_rng(i).random((40, 40))) for i in range(12)}
    before, (soft, hard) = threading.active_count(), resource.getrlimit(resource.RLIMIT_FSIZE)
    cli.drop_echoes()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
        with pytest.raises(ValueError) as caught:
            Checkpoints(tmp_path / "run").save(1, {"trainable": arrays}, arrays, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    message, code = cli.explain(caught.value)
    assert (
        code == 1 and f"error: {tmp_path / 'run/checkpoints'}" in message and "ulimit -f" in message
    )
    while threading.active_count() > before:
        time.sleep(0.01)
    del caught
    gc.collect()
    assert "Traceback" not in capfd.readouterr().err and not caplog.records


def test_too_little_space_is_an_error_before_the_first_byte(tmp_path, monkeypatch):
    check_space(tmp_path / "not/there/yet", 1000, "the checkpoint")
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 500, 500)
    )
    with pytest.raises(UserError, match=r"the checkpoint needs 0\.0 MB, the disk has 0\.0 MB left"):
        check_space(tmp_path / "not/there/yet", 1000, "the checkpoint")
    checkpoints = Checkpoints(tmp_path / "run")
    with pytest.raises(UserError, match="disk"):
        checkpoints.save(
            1,
            {"trainable": {"a": np.zeros(1000, np.float32)}},
            {"a": np.zeros(1000, np.float32)},
            {},
        )
    assert checkpoints.latest() is None


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    "number, code, word", [(signal.SIGTERM, 143, "SIGTERM"), (signal.SIGINT, 130, "Ctrl-C")]
)
def test_a_second_signal_ends_at_once(number, code, word):
    """The first one only leaves a note; 'again' shows that the program went on. The second one
    comes while it hangs inside a library, on a lock that it holds already, where no handler of
    Python's runs.
    """
    program = (
        "import ctypes, signal; from wan_jax.command_line import cli; "
        "signal.signal(signal.SIGINT, cli.interrupt); cli.end_well_on_signals(); "
        "print('ready', flush=True)\nwhile not cli.asked_to_end.wait(0.05): pass\n"
        "print('again', cli.asked_by(), flush=True); "
        "library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)\nwhile True: "
        "library.pthread_mutex_lock(mutex)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        for line in ("ready", f"again {word}"):
            assert process.stdout.readline() == f"{line}\n"
            time.sleep(0.5)
            process.send_signal(number)
        assert process.wait(20) == code
        error = process.stderr.read()
    assert f"{word}: the run ends" in error and "a second one ends it at once" in error
    assert (cli.STOPPED in error) == (number == signal.SIGINT)

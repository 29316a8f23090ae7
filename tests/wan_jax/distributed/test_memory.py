"""How much of the host's memory the devices may pin."""

import types

import pytest

from wan_jax.distributed import memory


@pytest.mark.parametrize(
    "files, count",
    [
        ((), 0),
        (("nvidia0", "nvidia1", "nvidiactl", "dri/renderD128"), 2),
        (("kfd", "dri/card0", "dri/renderD128", "dri/renderD129"), 2),
    ],
)
def test_gpus_of_the_host(tmp_path, monkeypatch, files, count):
    monkeypatch.setattr(memory, "DEVICES", tmp_path)
    (tmp_path / "dri").mkdir()
    for name in files:
        (tmp_path / name).touch()
    assert memory.gpus() == count


@pytest.mark.parametrize(
    "gpus, gib, said, wanted",
    [
        (0, 500, None, 400),
        (4, 500, None, 100),
        (8, 500, None, 64),
        (1, 32, None, 64),
        (4, 500, "7", 7),
    ],
)
def test_what_is_pinned_is_shared_by_the_hosts_gpus(monkeypatch, gpus, gib, said, wanted):
    """And is never less than what XLA allows by itself."""
    monkeypatch.setattr(memory, "gpus", lambda: gpus)
    monkeypatch.setattr(
        memory.os, "sysconf", {"SC_PAGE_SIZE": 2**12, "SC_PHYS_PAGES": gib * 2**18}.get
    )
    monkeypatch.setenv(memory.PINNED, said or "0")  # put back in the end
    if not said:
        monkeypatch.delenv(memory.PINNED)
    memory.allow_pinned()
    assert memory.pinned_limit(types.SimpleNamespace(platform="gpu")) == wanted * memory.GIB
    assert memory.pinned_limit(types.SimpleNamespace(platform="cpu")) is None

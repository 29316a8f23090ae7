"""How much of the host's memory the devices may pin."""

import types

import pytest

from wan_jax import memory


@pytest.mark.parametrize("files, count", [((), 0), (("nvidia0", "nvidia1", "nvidiactl", "dri/renderD128"), 2),
                                          (("kfd", "dri/card0", "dri/renderD128", "dri/renderD129"), 2)])
def test_gpus_of_the_host(tmp_path, files, count):
    (tmp_path / "dri").mkdir()
    for name in files:
        (tmp_path / name).touch()
    assert memory.gpus(tmp_path) == count


@pytest.mark.parametrize("gpus, said, wanted", [(0, None, 0.8), (4, None, 0.2), (4, "7", None)])
def test_what_is_pinned_is_shared_by_the_hosts_gpus(monkeypatch, gpus, said, wanted):
    monkeypatch.setattr(memory, "gpus", lambda: gpus)
    monkeypatch.setenv(memory.PINNED, "0")  # put back in the end
    monkeypatch.delenv(memory.PINNED)
    if said:
        monkeypatch.setenv(memory.PINNED, said)
    memory.allow_pinned()
    limit = memory.pinned_limit(types.SimpleNamespace(platform="gpu"))
    total = memory.os.sysconf("SC_PAGE_SIZE") * memory.os.sysconf("SC_PHYS_PAGES")
    assert abs(limit - (wanted * total if wanted else 7 * memory.GIB)) <= memory.GIB
    assert memory.pinned_limit(types.SimpleNamespace(platform="cpu")) is None

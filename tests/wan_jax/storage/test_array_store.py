"""The arrays of a component on disk: written and read by layer, by rows and by shard."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from wan_jax.distributed.mesh import make_mesh
from wan_jax.storage import array_store, integrity

ARRAYS = {
    "blocks/kernel": ((3, 8, 4), np.float32, True),
    "table": ((10, 6), np.float32, False),
}
VALUES = {
    name: np.arange(np.prod(shape), dtype=dtype).reshape(shape)
    for name, (shape, dtype, _) in ARRAYS.items()
}


@pytest.fixture
def path(tmp_path):
    store = array_store.create(tmp_path / "params", ARRAYS)
    with pytest.raises(array_store.StoreError, match="blocks/kernel"):
        store.check_whole()
    for layer in range(3):
        store.write("blocks/kernel", VALUES["blocks/kernel"][layer], layer=layer)
    store.write("table", VALUES["table"][:7])
    store.write("table", VALUES["table"][7:], row=7)
    return tmp_path / "params"


def test_there_and_back(path):
    store = array_store.ArrayStore(path, files=integrity.measure(path))
    store.check_whole()
    for name, value in VALUES.items():
        np.testing.assert_array_equal(store.read(name), value)
    np.testing.assert_array_equal(store.read("blocks/kernel", 1), VALUES["blocks/kernel"][1])
    np.testing.assert_array_equal(store.read("table", rows=slice(2, 5)), VALUES["table"][2:5])
    sharding = NamedSharding(make_mesh(4, jax.devices()[:4]), P(None, "fsdp"))
    placed = store.place("blocks/kernel", np.float16, sharding)
    assert placed.dtype == np.float16 and placed.sharding == sharding
    np.testing.assert_array_equal(placed, VALUES["blocks/kernel"])


def test_damage_is_found_when_the_file_is_read(path):
    store = array_store.ArrayStore(path, files=integrity.measure(path))
    (file,) = store.chunk_files("blocks/kernel", 1)
    content = bytearray(file.read_bytes())
    content[5] ^= 1
    file.write_bytes(content)
    store.read("blocks/kernel", 0)
    with pytest.raises(array_store.StoreError, match=str(file)):
        store.read("blocks/kernel", 1)


def test_chunks_are_layers_and_no_larger_than_the_limit(monkeypatch):
    monkeypatch.setattr(array_store, "CHUNK", 1000)
    assert array_store.chunk_shape((3, 8, 4), 4, stacked=True) == (1, 8, 4)
    assert array_store.chunk_shape((100, 10), 4, stacked=False) == (25, 10)

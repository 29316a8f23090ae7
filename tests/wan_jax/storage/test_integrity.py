"""Manifests of sizes and digests."""

import json

import pytest

from wan_jax.storage import integrity


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/large").write_bytes(bytes(range(256)) * 5000)  # more than one block
    (tmp_path / "small").write_bytes(b"one line\n")
    (tmp_path / "empty").write_bytes(b"")
    integrity.write_manifest(tmp_path / "digests.json", {"format": 2}, integrity.measure(tmp_path))
    return tmp_path


def test_a_manifest_comes_back_and_finds_no_problem(folder):
    manifest = integrity.read_manifest(folder / "digests.json")
    assert manifest["format"] == 2 and manifest["files"].keys() == {"a/large", "small", "empty"}
    assert integrity.problem(folder, manifest["files"]) is None
    buffer = bytearray(256 * 5000)
    integrity.read_into(folder / "a/large", memoryview(buffer), manifest["files"]["a/large"])
    assert buffer == (folder / "a/large").read_bytes()


@pytest.mark.parametrize("at", [0, 2**20 - 1, 2**20, 256 * 5000 - 1])
def test_one_flipped_bit_is_found(folder, at):
    files = integrity.read_manifest(folder / "digests.json")["files"]
    content = bytearray((folder / "a/large").read_bytes())
    content[at] ^= 1
    (folder / "a/large").write_bytes(content)
    assert integrity.problem(folder, files).startswith("a/large differs")
    with pytest.raises(integrity.Damaged, match="large differs"):
        integrity.read_into(
            folder / "a/large", memoryview(bytearray(len(content))), files["a/large"]
        )


def test_missing_truncated_and_replaced_files_are_named(folder):
    files = integrity.read_manifest(folder / "digests.json")["files"]
    (folder / "small").write_bytes(b"one")
    assert integrity.problem(folder, files) == "small has 3 bytes, it should have 9"
    (folder / "small").unlink()
    assert integrity.problem(folder, files) == "small is missing"
    (folder / "small").mkdir()
    assert integrity.problem(folder, files) == "small is a folder, not a file"
    with pytest.raises(integrity.Damaged, match="small"):
        integrity.read_into(folder / "small", memoryview(bytearray(9)), files["small"])


def test_every_flipped_bit_of_a_manifest_is_found_or_harmless(folder):
    path = folder / "digests.json"
    wanted, content = integrity.read_manifest(path), path.read_bytes()
    refused = 0
    for at in range(len(content)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
        try:
            assert integrity.read_manifest(path) == wanted
        except integrity.Damaged:
            refused += 1
    assert refused > len(content) / 2
    for text in ("", "{", "[]", "\xff", json.dumps({"files": {}})):
        path.write_text(text, encoding="latin-1")
        with pytest.raises(integrity.Damaged, match=r"digests\.json"):
            integrity.read_manifest(path)

"""Tests of the conversion in pieces: memory, continuing after a kill, and data types."""

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert import from_diffusers, plan
from convert.folders import JOURNAL, partial_folder, whole_folder
from convert.from_diffusers import check, convert
from convert.plan import STEMS
from tests import tiny
from wan_jax.command_line.cli import UserError
from wan_jax.storage import array_store, model_dir
from wan_jax.storage.tensor_files import Shards


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def run(code, *args, **kwargs):
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
        env=env,
        **kwargs,
    )


# ---- memory --------------------------------------------------------------------------------------

PEAK = r"""
import re, sys
from convert import from_diffusers
from wan_jax.storage import array_store
array_store.CHUNK = 2**22
# not ru_maxrss, which begins at the parent's
peak = lambda: 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1])
convert = lambda i: from_diffusers.convert(sys.argv[2 * i - 1], sys.argv[2 * i], "bfloat16")
convert(1)
before = peak()
convert(2)
print("convert", peak() - before)
from_diffusers.check(sys.argv[3], sys.argv[4])
print("check", peak() - before)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(source, own, tmp_path):
    """A text encoder of 260 MB in float32, 31 MB of it one embedding: less than a third of it in
    memory at once.
    """
    settings = tiny.SETTINGS["text_encoder"] | {
        "vocab_size": 30000,
        "d_model": 256,
        "d_ff": 4096,
        "num_layers": 18,
    }
    (own / "text_encoder/config.json").write_text(json.dumps(settings))
    shapes = tiny.state_dict_shapes("text_encoder", settings)
    weights = {k: np.full(s, 0.5, np.float32) for k, s in shapes.items()}
    size = sum(v.nbytes for v in weights.values())
    assert size > 255e6
    save_file(weights, own / "text_encoder/model.safetensors")
    del weights
    done = run(PEAK, source, tmp_path / "small", own, tmp_path / "large")
    assert done.returncode == 0, done.stderr
    grown = {
        line.split()[0]: int(line.split()[1])
        for line in done.stdout.splitlines()
        if line.count(" ") == 1
    }
    assert grown["convert"] < size / 3 and grown["check"] < size / 3
    stored = tiny.stored_arrays(model_dir.open_model(tmp_path / "large"), "text_encoder")
    assert all((v == 0.5).all() and v.dtype == ml_dtypes.bfloat16 for v in stored.values())


@pytest.mark.slow
def test_arrays_in_small_pieces_are_the_same(source, converted, tmp_path, monkeypatch):
    """Chunks of a few rows, for the embedding that is read in parts and for the layers, also where
    none divides it.
    """
    monkeypatch.setattr(array_store, "CHUNK", 1500)
    convert(str(source), tmp_path / "pieces", "bfloat16")
    whole, pieces = (model_dir.open_model(folder) for folder in (converted, tmp_path / "pieces"))
    assert len(list(pieces.path.rglob("*"))) > 2 * len(list(whole.path.rglob("*")))
    for component in whole.components:
        a, b = tiny.stored_arrays(whole, component), tiny.stored_arrays(pieces, component)
        assert a.keys() == b.keys() and all(np.array_equal(as_bits(a[k]), as_bits(b[k])) for k in a)
    check(str(source), tmp_path / "pieces")


def as_bits(value):
    return value.view(f"u{value.dtype.itemsize}")


def test_the_store_is_an_orbax_checkpoint(converted):
    """Orbax itself restores it, without knowing of us: whole, and sharded."""
    import jax
    import orbax.checkpoint as ocp

    path = model_dir.params_path(converted, "transformer")
    stored = tiny.stored_arrays(model_dir.open_model(converted), "transformer")
    mesh = jax.make_mesh((4,), ("x",), devices=jax.devices()[:4])
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "x"))
    name = "blocks/ffn/net_2/kernel"
    abstract = {
        k: jax.ShapeDtypeStruct(
            v.shape,
            v.dtype,
            sharding=rows
            if k == name
            else jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()),
        )
        for k, v in stored.items()
    }
    with ocp.StandardCheckpointer() as checkpointer:
        restored, sharded = checkpointer.restore(path), checkpointer.restore(path, abstract)
    assert restored.keys() == stored.keys()
    assert all(
        np.array_equal(restored[k], v) and restored[k].dtype == v.dtype for k, v in stored.items()
    )
    assert sharded[name].sharding == rows and np.array_equal(
        np.asarray(sharded[name]), stored[name]
    )


def test_a_store_that_lost_a_file_is_refused(own_model):
    model = model_dir.open_model(own_model)
    params = model_dir.params_path(own_model, "vae")
    chunk = next(f for f in sorted((params / "quant_conv/kernel").iterdir()) if f.name != ".zarray")
    content = chunk.read_bytes()
    chunk.write_bytes(content[:-1])
    with pytest.raises(
        UserError,
        match=r"files of 1 arrays are missing or truncated \(quant_conv/kernel\).*convert",
    ):
        tiny.stored_arrays(model, "vae")
    chunk.unlink()
    with pytest.raises(UserError, match=r"missing or truncated \(quant_conv/kernel\)"):
        model_dir.build("vae", model)
    (params / "quant_conv/kernel/.zarray").unlink()
    with pytest.raises(UserError, match=r"vae/params is missing or damaged"):
        model_dir.build("vae", model)
    shutil.rmtree(params)
    shutil.copytree(model_dir.params_path(own_model, "transformer"), params)
    with pytest.raises(UserError, match=r"vae/params is missing or damaged: _METADATA"):
        model_dir.build("vae", model)
    # what a folder without digests says
    with pytest.raises(UserError, match=r"does not fit vae/config.json"):
        model_dir.build("vae", model_dir.open_model(own_model, verify=False))


def test_load_onto_a_mesh_is_what_is_stored(source, tmp_path):
    """Arrays split and replicated over 8 devices, in the file's dtype and in another."""
    import jax
    import jax.numpy as jnp

    from wan_jax.distributed import mesh as mesh_lib
    from wan_jax.distributed import sharding as sharding_lib
    from wan_jax.models import flat_params

    convert(str(source), tmp_path / "model", "float32")
    model = model_dir.open_model(tmp_path / "model")
    stored = tiny.stored_arrays(model, "text_encoder")
    mesh = mesh_lib.make_mesh(fsdp=4)
    for dtype in (jnp.float32, jnp.bfloat16):
        _, like = model_dir.abstract("text_encoder", model.config("text_encoder"), dtype=dtype)
        for name, value in flat_params.flatten(model.load("text_encoder", like, mesh)).items():
            assert value.dtype == flat_params.flatten(like)[name].dtype
            assert np.array_equal(np.asarray(value), stored[name].astype(value.dtype))
            assert value.sharding.is_equivalent_to(
                sharding_lib.param_shardings({name: value}, mesh)[name], value.ndim
            )
    assert jax.device_count() == 8


# ---- kill and continue ---------------------------------------------------------------------------

DIE = """
import os, signal, sys
from convert import from_diffusers
from convert.plan import Plan
from_diffusers.RECORD_BYTES = 0
from_diffusers.WORKERS = 1
pieces, count = Plan.pieces, 0
def dying(self, entry):
    global count
    count += 1
    if count == int(sys.argv[3]):
        os.kill(os.getpid(), getattr(signal, sys.argv[4]))
    yield from pieces(self, entry)
Plan.pieces = dying
from_diffusers.convert(sys.argv[1], sys.argv[2], "bfloat16")
"""
KILLED_AT = 90  # of the transformer's tensors and those of the text encoder


@pytest.fixture(scope="module")
def killed(source, tmp_path_factory):
    """Return a function that puts there what a conversion of `source` to `dst` leaves which a
    signal ended.
    """

    @functools.cache
    def left_by(how):
        dst = tmp_path_factory.mktemp("killed") / "model"
        done = run(DIE, source, dst, KILLED_AT, how)
        assert done.returncode == -getattr(signal, how), done.stderr
        assert not dst.exists() and (partial_folder(dst) / JOURNAL).is_file()
        with pytest.raises(UserError, match=r"no converted model|Diffusers folder"):
            model_dir.open_model(partial_folder(dst))
        return dst

    def put(dst, how="SIGKILL"):
        assert dst.name == left_by(how).name
        shutil.copytree(left_by(how).parent, dst.parent, dirs_exist_ok=True)

    return put


def counted(monkeypatch):
    """The keys of the tensors that are read from the source from now on, one after the other."""
    keys, pieces = [], plan.Plan.pieces
    monkeypatch.setattr(from_diffusers, "WORKERS", 1)

    def counting(self, entry):
        keys.append((self.component, entry.key))
        return pieces(self, entry)

    monkeypatch.setattr(plan.Plan, "pieces", counting)
    return keys


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGKILL", "SIGINT"])
def test_a_killed_conversion_continues(
    source, converted, killed, tmp_path, monkeypatch, capsys, how
):
    keys = counted(monkeypatch)
    convert(str(source), tmp_path / "wanted" / "again", "bfloat16")
    everything = list(keys)
    killed(tmp_path / "model", how)
    capsys.readouterr()
    keys.clear()
    convert(str(source), tmp_path / "model", "bfloat16")
    # what was written but not yet recorded is done again
    assert (
        len(everything) - KILLED_AT < len(keys) < len(everything)
        and keys == everything[-len(keys) :]
    )
    assert re.search(r"transformer: 69 tensors, .* \d+ of them earlier", capsys.readouterr().out)
    got, wanted = contents(tmp_path / "model"), contents(converted)
    assert {k for k in got.keys() | wanted.keys() if got.get(k) != wanted.get(k)} <= {
        f"{c}/params/{name}"
        for c in model_dir.COMPONENTS
        for name in ("_CHECKPOINT_METADATA", "commit_success.txt")
    }
    # which hold the time
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "wanted"]


def test_a_line_cut_short_and_a_lost_file_are_done_again(source, killed, tmp_path, monkeypatch):
    killed(tmp_path / "model")
    partial = partial_folder(tmp_path / "model")
    journal = partial / JOURNAL
    lines = journal.read_text().splitlines()
    journal.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:-4])
    shutil.rmtree(partial / "transformer/params/proj_out/kernel")
    keys = counted(monkeypatch)
    convert(str(source), tmp_path / "model", "bfloat16")
    again = json.loads(lines[-1])
    assert (again["component"], again["keys"][0]) in keys
    assert {k for c, k in keys if c == "transformer"} == set(
        Shards(source / "transformer", STEMS["transformer"]).where
    )
    check(str(source), tmp_path / "model")


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("what", ["weights", "time", "config", "dtype"])
def test_a_changed_source_is_refused(own, killed, tmp_path, what):
    dst, dtype = tmp_path / "model", "bfloat16"
    killed(dst)
    path = own / "vae" / "diffusion_pytorch_model.safetensors"
    if what == "weights":
        save_file({k: v + 1 for k, v in load_file(path).items()}, path)
    elif what == "time":
        os.utime(path)
    elif what == "config":
        path = own / "scheduler/scheduler_config.json"
        path.write_text(path.read_text() + "\n")
    else:
        dtype = "float32"
    named = "dtypes" if what == "dtype" else f"1 files.*{path.relative_to(own)}"
    before = contents(partial_folder(dst))
    with pytest.raises(UserError, match=rf"{named}.*--restart"):
        convert(str(own), dst, dtype)
    assert contents(partial_folder(dst)) == before and not dst.exists()
    convert(str(own), dst, dtype, restart=True)
    check(str(own), dst)


def test_a_source_that_changes_under_way_is_noticed(own, tmp_path, monkeypatch):
    pieces = plan.Plan.pieces

    def changing(self, entry):
        if self.component == "vae":
            os.utime(own / "transformer" / "config.json", ns=(1, 1))
        return pieces(self, entry)

    monkeypatch.setattr(plan.Plan, "pieces", changing)
    with pytest.raises(UserError, match="changed while it was read"):
        convert(str(own), tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.slow
def test_two_conversions_to_one_folder(source, tmp_path):
    with whole_folder(tmp_path / "model", False, resumable=True):
        with pytest.raises(UserError, match=r"model is in use by process \d+ .*--dst"):
            convert(str(source), tmp_path / "model")
    assert (tmp_path / "model").is_dir()


# ---- types ---------------------------------------------------------------------------------------


def test_dtype_for_each_component(source, tmp_path):
    convert(str(source), tmp_path / "model", "bfloat16,text_encoder=float32")
    model = model_dir.open_model(tmp_path / "model")
    found = {
        c: {str(v.dtype) for v in tiny.stored_arrays(model, c).values()} for c in model.components
    }
    assert found == {
        "transformer": {"bfloat16", "float32"},
        "vae": {"float32"},
        "text_encoder": {"float32"},
    }
    check(str(source), tmp_path / "model")


def test_types_that_are_not_read(own, tmp_path):
    path = own / "vae" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(path) | {"quant_conv.bias": np.zeros(32, np.int8)}, path)
    with pytest.raises(UserError, match=r"quant_conv.bias has the type I8.*F64, F32"):
        convert(str(own), tmp_path / "model")

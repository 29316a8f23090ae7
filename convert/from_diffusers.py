"""Converts a Wan checkpoint in Diffusers layout to a model folder that this project reads.

    python -m convert.from_diffusers --src Wan-AI/Wan2.1-T2V-1.3B-Diffusers --dst models/wan-1.3b
    [--dtype bfloat16]

`--src` is a local folder or a hub id. bfloat16 keeps in float32 what the models keep so (the
transformer's time embedder, scale_shift_tables and norm2), and the VAE whole; `--dtype
bfloat16,text_encoder=float32` names exceptions. Every tensor is accounted for, both ways. `--check`
compares a converted folder with its source, bit for bit.

Tensors go a few at a time from the source's files to their place in ours, so memory does not grow
with the model (see benchmarks/convert.py). A conversion that was stopped or killed continues when
the same command is run again.
"""

import contextlib
import pathlib
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from absl import flags
from tqdm import tqdm

from convert.check import differences
from convert.folders import LEFT_OUT, partial_folder, whole_folder
from convert.journal import Journal
from convert.plan import DTYPES, STEMS, Plan, parse_dtypes, plan_component
from convert.source import (
    check_copied,
    check_destination,
    check_pipeline,
    copied_files,
    source_folder,
    two_experts,
)
from wan_jax.command_line import cli
from wan_jax.errors import UserError
from wan_jax.storage import array_store, integrity, model_dir
from wan_jax.storage.paths import expand

__all__ = ["DTYPES", "STEMS", "check", "convert"]

# written between two entries of the journal: what a kill or a power cut costs at most
RECORD_BYTES = 2**30
WORKERS = 4  # tensors under way at once, each at most a few hundred MB


def planned(src: pathlib.Path, index: dict, dtypes: dict[str, str]) -> dict[str, Plan]:
    """The plans of all components: whatever is wrong with the source's headers is found before data
    is written.
    """
    check_copied(src)
    return {
        c: plan_component(c, src, dtypes[c])
        for c in model_dir.COMPONENTS
        if c != "transformer_2" or two_experts(index)
    }


def fingerprint(src: pathlib.Path, plans: dict[str, Plan]) -> dict[str, list[int]]:
    """{file: [bytes, time of last change in ns]} of all that is converted."""
    files = [src / "model_index.json", *copied_files(src)]
    for plan in plans.values():
        files += [src / plan.component / "config.json", *plan.shards.files]
    return {
        str(f.relative_to(src)): [f.stat().st_size, f.stat().st_mtime_ns] for f in sorted(files)
    }


def reopened(plan: Plan, path: pathlib.Path, done: set[str]) -> array_store.ArrayStore | None:
    """What a killed conversion left of a component, when it holds what its journal says."""
    if not done:
        return None
    try:
        store = array_store.ArrayStore(path)
    except array_store.StoreError:
        return None
    same = {name: (store.shapes[name], store.dtypes[name]) for name in store.shapes} == {
        name: (tuple(shape), dtype) for name, (shape, dtype, _) in plan.arrays.items()
    }
    written = same and all(store.is_written(e.path, e.layer) for e in plan.table if e.key in done)
    return store if written else None


@contextlib.contextmanager
def cancelling_pool(workers: int) -> Iterator[ThreadPoolExecutor]:
    """A thread pool that forgets what is still in the queue when the block ends with an exception."""
    pool = ThreadPoolExecutor(workers)
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def write_component(plan: Plan, dst: pathlib.Path, journal: Journal) -> dict:
    """Writes one component's folder, without what the journal knows as done; returns its line of
    the manifest.

    The journal learns of a tensor when its bytes are on the disk, so it can be believed after a
    power cut too.
    """
    start, path = time.monotonic(), model_dir.params_path(dst, plan.component)
    path.parent.mkdir(exist_ok=True)
    shutil.copyfile(plan.source / plan.component / "config.json", path.parent / "config.json")
    store = reopened(plan, path, journal.done(plan.component))
    if store is None:
        journal.forget(plan.component)
        store = array_store.create(path, plan.arrays)
    done = journal.done(plan.component)

    def write(entry):
        for row, value in plan.pieces(entry):
            store.write(entry.path, value, entry.layer, row)

    written, unrecorded = [], 0
    with (
        tqdm(
            desc=plan.component,
            total=plan.size,
            unit="B",
            unit_scale=True,
            leave=False,
            disable=None,
            initial=sum(plan.stored_bytes(e) for e in plan.table if e.key in done),
        ) as bar,
        cancelling_pool(WORKERS) as pool,
    ):
        for entry, future in [(e, pool.submit(write, e)) for e in plan.table if e.key not in done]:
            future.result()
            bar.update(plan.stored_bytes(entry))
            written.append(entry.key)
            unrecorded += plan.stored_bytes(entry)
            if unrecorded >= RECORD_BYTES:
                journal.add(plan.component, written)
                written, unrecorded = [], 0
    journal.add(plan.component, written)
    earlier = f", {len(done)} tensors of them earlier" if done else ""
    print(
        f"{plan.component}: {len(plan.table)} tensors, {plan.parameters:,} parameters, "
        f"{plan.size / 1e9:.3f} GB, {time.monotonic() - start:.1f} s{earlier}",
        flush=True,
    )
    return {"tensors": len(plan.table), "parameters": plan.parameters, "bytes": plan.size}


def convert(
    src: str,
    dst,
    dtype: str = "source",
    overwrite: bool = False,
    restart: bool = False,
    *,
    revision: str | None = None,
) -> None:
    """Convert `src` (folder or hub id) into the folder `dst`, or continue where a killed conversion
    stopped.

    `restart` throws away what a killed one left. Raises `UserError`; `dst` is whole or not there.
    """
    dtypes = parse_dtypes(dtype)
    dst, folder = expand(dst), source_folder(src, revision)
    check_destination(folder, dst)
    plans = planned(folder, check_pipeline(folder), dtypes)
    work = {
        "format": model_dir.FORMAT,
        "dtypes": {c: dtypes[c] for c in plans},
        "files": fingerprint(folder, plans),
    }
    with whole_folder(dst, overwrite, resumable=True) as partial:
        journal = Journal(partial, work, restart)
        there = sum(f.stat().st_blocks * 512 for f in partial.glob("*/params/**/*") if f.is_file())
        cli.check_space(
            dst.parent, sum(p.size for p in plans.values()) - there, f"the model {dst.name}"
        )
        shutil.copyfile(folder / "model_index.json", partial / "model_index.json")
        for file in copied_files(folder):
            target = partial / file.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
        manifest = {"format": model_dir.FORMAT, "source": src, "dtype": dtype}
        if revision is not None:
            manifest["revision"] = revision
        manifest["components"] = {
            c: write_component(plan, partial, journal) for c, plan in plans.items()
        }
        if fingerprint(folder, plans) != work["files"]:
            raise UserError(f"{folder} changed while it was read; run the same command again")
        (partial / model_dir.MANIFEST).unlink(missing_ok=True)
        left_out = {LEFT_OUT, *(f"{c}/params/{name}" for c in plans for name in array_store.TIMES)}
        integrity.write_manifest(
            partial / model_dir.MANIFEST, manifest, integrity.measure(partial, left_out)
        )
    size = sum(f.stat().st_size for f in dst.rglob("*") if f.is_file())
    print(f"{dst}: {size / 1e9:.3f} GB, ready for grpo.train and wan_jax.sample")


def check(src: str, dst, *, revision: str | None = None) -> None:
    """Compare the model folder `dst` with its source, tensor by tensor. Raise `UserError` with the
    first differences.
    """
    # all bytes are compared here
    model, folder = model_dir.open_model(dst, verify=False), source_folder(src, revision)
    plans = planned(folder, check_pipeline(folder), parse_dtypes(model.manifest["dtype"]))
    found = []
    if tuple(plans) != model.components:
        found.append(
            f"components: {', '.join(model.components)}, the source has {', '.join(plans)}"
        )
    files = [
        "model_index.json",
        *(f"{c}/config.json" for c in plans),
        *(str(f.relative_to(folder)) for f in copied_files(folder)),
    ]
    found += [
        f"{name}: is missing or differs"
        for name in files
        if not (model.path / name).is_file()
        or (model.path / name).read_bytes() != (folder / name).read_bytes()
    ]
    for component in [c for c in plans if c in model.components]:
        found += differences(plans[component], model)
    if found:
        more = f"\n  and {len(found) - 5} more" if len(found) > 5 else ""
        raise UserError(
            f"{dst} differs from {src} in {len(found)} places; convert it again with --overwrite\n"
            "  " + "\n  ".join(found[:5]) + more
        )
    print(
        f"{dst}: {sum(len(p.table) for p in plans.values())} tensors agree with {src}, bit for bit"
    )


def main(_):
    FLAGS = flags.FLAGS
    if FLAGS.check:
        check(FLAGS.src, FLAGS.dst, revision=FLAGS.revision)
        return
    try:
        convert(
            FLAGS.src,
            FLAGS.dst,
            FLAGS.dtype,
            FLAGS.overwrite,
            FLAGS.restart,
            revision=FLAGS.revision,
        )
    except KeyboardInterrupt:
        if (partial := partial_folder(FLAGS.dst)).exists():
            print(
                f"\nwhat is done is kept in {partial}; remove it if you do not mean to continue",
                flush=True,
            )
        raise


if __name__ == "__main__":
    flags.DEFINE_string("src", None, "folder in Diffusers layout, or hub id", required=True)
    flags.DEFINE_string("revision", None, "branch, tag or commit of a hub id")
    flags.DEFINE_string("dst", None, "folder to write", required=True)
    flags.DEFINE_string(
        "dtype",
        "source",
        f"type of the weights: source (each tensor's own), {' or '.join(DTYPES)}; "
        "exceptions after a comma: bfloat16,text_encoder=float32",
    )
    flags.DEFINE_bool("overwrite", False, "replace an existing --dst")
    flags.DEFINE_bool(
        "restart", False, "throw away what a killed conversion to the same --dst left"
    )
    flags.DEFINE_bool("check", False, "compare an existing --dst with --src instead of converting")
    cli.run(main)

"""Converts a Wan checkpoint in Diffusers layout to a model folder that this project reads.

    python -m convert.from_diffusers --src Wan-AI/Wan2.1-T2V-1.3B-Diffusers --dst models/wan2.1-1.3b
    python -m convert.from_diffusers --src ... --dst ... --dtype bfloat16,text_encoder=float32
    python -m convert.from_diffusers --src ... --dst ... --check

`--src` is a local folder or a hub id. `--dtype bfloat16` leaves in float32 the VAE and what the
models keep in float32 (the transformer's time embedder, scale_shift_tables and norm2); exceptions
follow after a comma. A tensor that is missing on either side is an error. `--check` compares a
converted folder with its source, bit for bit.

A few tensors at a time are copied from the source's files into the new ones, so the memory needed
does not grow with the model. A conversion that was stopped or killed continues when the same
command is run again.
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
from convert.folders import JOURNAL, partial_folder, whole_folder
from convert.journal import Journal
from convert.plan import Plan, parse_dtypes, plan_component
from convert.source import (
    check_copied,
    check_destination,
    check_pipeline,
    copied_files,
    source_folder,
    two_experts,
)
from wan_jax.choices import DTYPES as DTYPE_NAMES
from wan_jax.command_line import cli
from wan_jax.command_line.flag_types import check_used
from wan_jax.errors import UserError
from wan_jax.storage import array_store, integrity, model_dir
from wan_jax.storage.paths import expand

# bytes written between two entries of the journal: the most that a kill or a power cut loses
RECORD_BYTES = 2**30
WORKERS = 4  # tensors converted at the same time, each at most a few hundred MB


def plan_components(src: pathlib.Path, index: dict, dtypes: dict[str, str]) -> dict[str, Plan]:
    """Return the plan of every component of the source folder.

    index: the content of model_index.json. dtypes: {component: 'source', 'float32' or 'bfloat16'}.
    Raises `UserError` on any error in the source's headers, before data is written.
    """
    check_copied(src)
    return {
        component: plan_component(component, src, dtypes[component])
        for component in model_dir.COMPONENTS
        if component != "transformer_2" or two_experts(index)
    }


def fingerprint(src: pathlib.Path, plans: dict[str, Plan]) -> dict[str, list[int]]:
    """Return {file: [bytes, time of last change in ns]} for every file that is converted."""
    files = [src / "model_index.json", *copied_files(src)]
    for plan in plans.values():
        files += [src / plan.component / "config.json", *plan.shards.files]
    return {
        str(file.relative_to(src)): [file.stat().st_size, file.stat().st_mtime_ns]
        for file in sorted(files)
    }


def reopen_store(plan: Plan, path: pathlib.Path, done: set[str]) -> array_store.ArrayStore | None:
    """Return the store of a killed conversion, or None unless it holds the tensors `done`."""
    if not done:
        return None
    try:
        store = array_store.ArrayStore(path)
    except array_store.StoreError:
        return None
    stored = {name: (store.shapes[name], store.dtypes[name]) for name in store.shapes}
    if stored != {name: (tuple(shape), dtype) for name, (shape, dtype, _) in plan.arrays.items()}:
        return None
    recorded = (entry for entry in plan.table if entry.key in done)
    return store if all(store.is_written(e.path, e.layer) for e in recorded) else None


@contextlib.contextmanager
def cancelling_pool(workers: int) -> Iterator[ThreadPoolExecutor]:
    """Yield a thread pool whose queued tasks are cancelled when the block ends."""
    pool = ThreadPoolExecutor(workers)
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def write_component(plan: Plan, dst: pathlib.Path, journal: Journal) -> dict:
    """Write one component's folder, except the tensors that the journal lists.

    Returns the component's entry of the manifest. A tensor is added to the journal after its bytes
    are on the disk, so the journal is correct after a power cut too.
    """
    start = time.monotonic()
    path = model_dir.params_path(dst, plan.component)
    path.parent.mkdir(exist_ok=True)
    shutil.copyfile(plan.source / plan.component / "config.json", path.parent / "config.json")
    store = reopen_store(plan, path, journal.done(plan.component))
    if store is None:
        journal.forget(plan.component)
        store = array_store.create(path, plan.arrays)
    done = journal.done(plan.component)

    def write(entry):
        for row, value in plan.pieces(entry):
            store.write(entry.path, value, entry.layer, row)

    written: list[str] = []  # keys and bytes since the last entry of the journal
    unrecorded = 0
    with (
        tqdm(
            desc=plan.component,
            total=plan.size,
            unit="B",
            unit_scale=True,
            leave=False,
            disable=None,
            initial=sum(plan.stored_bytes(e) for e in plan.table if e.key in done),
        ) as progress,
        cancelling_pool(WORKERS) as pool,
    ):
        tasks = [(e, pool.submit(write, e)) for e in plan.table if e.key not in done]
        for entry, task in tasks:
            task.result()
            progress.update(plan.stored_bytes(entry))
            written.append(entry.key)
            unrecorded += plan.stored_bytes(entry)
            if unrecorded >= RECORD_BYTES:
                journal.add(plan.component, written)
                written, unrecorded = [], 0
    journal.add(plan.component, written)
    earlier = f", {len(done)} of them earlier" if done else ""
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
    """Convert `src` (folder or hub id) into the folder `dst`, or continue a killed conversion.

    dtype: as `parse_dtypes` takes it. overwrite: replace an existing model. restart: discard what a
    killed conversion left. revision: branch, tag or commit of a hub id. Raises `UserError`; `dst`
    is complete or does not exist.
    """
    # Read all headers; nothing is written before they are known to be valid
    dtypes = parse_dtypes(dtype)
    given = dst
    dst, folder = expand(dst), source_folder(src, revision)
    check_destination(folder, dst)
    plans = plan_components(folder, check_pipeline(folder), dtypes)
    work = {
        "format": model_dir.FORMAT,
        "dtypes": {component: dtypes[component] for component in plans},
        "files": fingerprint(folder, plans),
    }
    with whole_folder(dst, overwrite, resumable=True) as partial:
        # Continue from the journal, and check that the rest fits on the disk
        journal = Journal(partial, work, restart)
        earlier = sum(
            file.stat().st_blocks * 512 for file in partial.glob("*/params/**/*") if file.is_file()
        )
        needed = sum(plan.size for plan in plans.values()) - earlier
        cli.check_space(dst.parent, needed, f"the model {dst.name}")
        # Copy the small files, and convert one component after the other
        shutil.copyfile(folder / "model_index.json", partial / "model_index.json")
        for file in copied_files(folder):
            target = partial / file.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
        manifest = {"format": model_dir.FORMAT, "source": src, "dtype": dtype}
        if revision is not None:
            manifest["revision"] = revision
        manifest["components"] = {
            component: write_component(plan, partial, journal) for component, plan in plans.items()
        }
        if fingerprint(folder, plans) != work["files"]:
            raise UserError(f"{folder} changed while it was read; run the same command again")
        # The manifest with every file's digest completes the folder
        (partial / model_dir.MANIFEST).unlink(missing_ok=True)
        excluded = {JOURNAL, *(f"{c}/params/{name}" for c in plans for name in array_store.TIMES)}
        integrity.write_manifest(
            partial / model_dir.MANIFEST, manifest, integrity.measure(partial, excluded)
        )
    size = sum(f.stat().st_size for f in dst.rglob("*") if f.is_file())
    print(f"{given}: {size / 1e9:.3f} GB, ready for grpo.train and wan_jax.sample")


def check(src: str, dst, *, revision: str | None = None) -> None:
    """Compare the model folder `dst` with its source, tensor by tensor.

    Raises `UserError` with the first five differences.
    """
    # without the check of digests, since all bytes are compared here
    model, folder = model_dir.open_model(dst, verify=False), source_folder(src, revision)
    dtypes = parse_dtypes(model.manifest["dtype"])
    plans = plan_components(folder, check_pipeline(folder), dtypes)
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
        f"{name} is missing or differs"
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
        converting = ("dtype", "overwrite", "restart")  # the type is that of the existing folder
        check_used(FLAGS, dict.fromkeys(converting, "to be without --check"))
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
                f"\n{partial} keeps the finished part; remove it unless you want to continue",
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
        f"data type of the weights: source (each tensor's own), {' or '.join(DTYPE_NAMES)}; exceptions "
        "for single components after a comma, as in bfloat16,text_encoder=float32",
    )
    flags.DEFINE_bool("overwrite", False, "replace an existing --dst")
    flags.DEFINE_bool("restart", False, "discard what a killed conversion to the same --dst left")
    flags.DEFINE_bool("check", False, "compare an existing --dst with --src instead of converting")
    cli.run(main)

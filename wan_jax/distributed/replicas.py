"""Comparison of the copies that several devices and processes have of the same arrays."""

import concurrent.futures
import hashlib

import jax
import numpy as np

from wan_jax.distributed import multihost
from wan_jax.errors import UserError


def replica_digests(tree) -> dict[tuple[int, ...], dict[int, str]]:
    """Compute SHA-256 digests of the shards on this process's devices of which there is a copy
    elsewhere.

    Returns {device: digest of all its shards} for each set of devices that have copies of the same
    shards. Arrays that are not shared between processes, so that each process has its own, are
    under () and the index of the process. A shard without a second copy is left out.
    """
    # Sort the shards: {device: {set of devices with the same shards: [(name, shard)]}}.
    by_device = {}
    own = hashlib.sha256()
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path)
        if jax.process_count() > 1 and x.is_fully_addressable:
            own.update(name.encode() + np.asarray(x).tobytes())
            continue
        holders = {}
        for device, index in x.sharding.devices_indices_map(x.shape).items():
            holders.setdefault(repr(index), []).append(device.id)
        for shard in x.addressable_shards:
            devices = tuple(sorted(holders[repr(shard.index)]))
            if len(devices) > 1:
                by_device.setdefault(shard.device.id, {}).setdefault(devices, []).append(
                    (f"{name}{shard.index}", shard.data)
                )

    # Digest them, one thread per device.
    def of_device(groups) -> dict[tuple[int, ...], str]:
        return {devices: _shards_digest(shards) for devices, shards in groups.items()}

    with concurrent.futures.ThreadPoolExecutor(max(1, len(by_device))) as threads:
        found = dict(zip(by_device, threads.map(of_device, by_device.values())))
    digests: dict[tuple[int, ...], dict[int, str]] = {(): {jax.process_index(): own.hexdigest()}}
    for device, groups in found.items():
        for devices, digest in groups.items():
            digests.setdefault(devices, {})[device] = digest
    return digests


def _shards_digest(shards: list[tuple[str, jax.Array]]) -> str:
    sha = hashlib.sha256()
    for name, data in shards:
        # a new array over the same memory: `data` itself would cache its copy on the host
        data = jax.make_array_from_single_device_arrays(data.shape, data.sharding, [data])
        sha.update(name.encode() + np.asarray(data).tobytes())
    return sha.hexdigest()


def check_same(tree, what: str) -> None:
    """Raise `UserError` unless all devices and processes have bit-identical copies of the shards of
    a tree of arrays. All processes must call this.

    Weights that are split over all devices have no second copy, so these cannot be compared.
    `multihost_utils.assert_equal` would gather the values themselves and does not report who
    differs.
    """
    gathered = multihost.gather(replica_digests(tree) if jax.process_count() > 1 else {})
    copies = {}  # {set of devices: [(process, digest)]}
    for process, digests in enumerate(gathered):
        for devices, of_device in digests.items():
            copies.setdefault(devices, []).extend(
                (process, digest) for digest in of_device.values()
            )
    # {process that differs: process it was compared with}
    wrong = {
        process: group[0][0]
        for group in copies.values()
        for process, digest in group
        if digest != group[0][1]
    }
    if wrong:
        process = min(wrong)
        other = (
            f"those of process {wrong[process]}"
            if wrong[process] != process
            else "each other on its devices"
        )
        raise UserError(
            f"{what} of process {process} differ from {other} ({len(wrong)} of {len(gathered)} "
            "processes do): a device or host computes wrongly; run the same command again without "
            "it: it continues after the last checkpoint"
        )

"""Peak memory of this process, on its devices and on the host, and how much of the host's its
devices may share.
"""

import dataclasses
import os
import pathlib
import re
import resource
import sys

import jax

GIB = 2**30
PINNED = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"  # XLA's variable, in GiB, of each device's pool
PINNED_LIMIT = 64  # where it is not set
# of the host's memory: XLA's pools grow by doubling, and what is pinned cannot be swapped
PINNED_SHARE = 0.8
GPUS = ("nvidia[0-9]*", "dri/renderD*")  # files of /dev, one a GPU


@dataclasses.dataclass(frozen=True)
class Peaks:
    """Bytes, since the process began."""

    device: int | None  # of the fullest device; None where the backend does not count
    host: int  # resident

    def known(self) -> dict[str, int]:
        return {k: v for k, v in dataclasses.asdict(self).items() if v is not None}

    def __str__(self) -> str:
        device = "unknown" if self.device is None else f"{self.device / GIB:.2f} GiB"
        return f"peak memory: device {device}, host {self.host / GIB:.2f} GiB"


def limit(device: jax.Device) -> int | None:
    """Bytes that this process may use of the device; None where the backend sets no limit (the
    CPU).
    """
    return (device.memory_stats() or {}).get("bytes_limit")


def peaks() -> Peaks:
    device = [(d.memory_stats() or {}).get("peak_bytes_in_use") for d in jax.local_devices()]
    return Peaks(max((x for x in device if x is not None), default=None), _host())


def allow_pinned() -> None:
    """Lets arrays in pinned host memory (`pinned_host`) take PINNED_SHARE of the host's, in equal
    parts for its GPUs, where that is more than XLA's own limit and the environment says nothing. A
    pool asks for twice as much whenever it is full, so with a limit that the host cannot bear it is
    killed long before all is in use. To be called before JAX sees a device.
    """
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    os.environ.setdefault(
        PINNED, str(max(PINNED_LIMIT, int(PINNED_SHARE * total / GIB / max(1, gpus()))))
    )


def gpus(devices: pathlib.Path = pathlib.Path("/dev")) -> int:
    """Of this host, whoever uses them; NVIDIA's where there are any, whose render nodes may be
    there as well.
    """
    return next((n for pattern in GPUS if (n := len(list(devices.glob(pattern))))), 0)


def pinned_limit(device: jax.Device) -> int | None:
    """Bytes of pinned host memory for the arrays of a device; None where there is no such limit
    (the CPU).
    """
    return int(os.environ.get(PINNED, PINNED_LIMIT)) * GIB if device.platform == "gpu" else None


def _host() -> int:
    status = pathlib.Path("/proc/self/status")  # ru_maxrss begins at the parent's
    if status.is_file() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )

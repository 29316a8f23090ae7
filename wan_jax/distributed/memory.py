"""Memory of this process: its peak on the devices and on the host, and the limits of both."""

import dataclasses
import os
import pathlib
import re
import resource
import sys

import jax

GIB = 2**30
PINNED = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"  # XLA's variable: GiB of the pool of each device
PINNED_LIMIT = 64  # XLA's default
# Share of the host's memory: XLA's pools grow by doubling, and pinned memory cannot be swapped.
PINNED_SHARE = 0.8
DEVICES = pathlib.Path("/dev")
GPUS = ("nvidia[0-9]*", "dri/renderD*")  # files of DEVICES, one per GPU


@dataclasses.dataclass(frozen=True)
class Peaks:
    """Peak memory in bytes since the process started."""

    device: int | None  # of the fullest device; None where the backend does not count it
    host: int  # resident set size

    def known(self) -> dict[str, int]:
        """Return the known values by name."""
        return {k: v for k, v in dataclasses.asdict(self).items() if v is not None}

    def __str__(self) -> str:
        device = "unknown" if self.device is None else f"{self.device / GIB:.2f} GiB"
        return f"peak memory: device {device}, host {self.host / GIB:.2f} GiB"


def limit(device: jax.Device) -> int | None:  # pyright: ignore[reportInvalidTypeForm]
    """Return the bytes that this process may use on the device; None where the backend sets no
    limit (CPU).
    """
    return (device.memory_stats() or {}).get("bytes_limit")


def peaks() -> Peaks:
    """Return the peak memory of this process so far."""
    device = [(d.memory_stats() or {}).get("peak_bytes_in_use") for d in jax.local_devices()]
    return Peaks(max((x for x in device if x is not None), default=None), _host())


def allow_pinned() -> None:
    """Raise XLA's limit on pinned host memory (`pinned_host`) to PINNED_SHARE of the host's memory,
    in equal parts for its GPUs, unless XLA's own limit is higher or the environment sets one.

    A full pool requests twice its size, so with a limit that the host does not have the process is
    killed long before all of it is in use. Must be called before JAX initialises a device.
    """
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    os.environ.setdefault(
        PINNED, str(max(PINNED_LIMIT, int(PINNED_SHARE * total / GIB / max(1, gpus()))))
    )


def gpus() -> int:
    """Return the number of GPUs of this host, whether or not this process uses them. NVIDIA's are
    counted first, because they may have render nodes too.
    """
    counts = (len(list(DEVICES.glob(pattern))) for pattern in GPUS)
    return next(filter(None, counts), 0)


def pinned_limit(device: jax.Device) -> int | None:  # pyright: ignore[reportInvalidTypeForm]
    """Return the bytes of pinned host memory for the arrays of a device; None where there is no
    such limit (CPU).
    """
    return int(os.environ.get(PINNED, PINNED_LIMIT)) * GIB if device.platform == "gpu" else None


def _host() -> int:
    status = pathlib.Path("/proc/self/status")  # ru_maxrss includes the parent's peak
    if status.is_file() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )

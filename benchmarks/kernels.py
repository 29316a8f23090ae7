"""Time on the device by kernel, from a trace of JAX's profiler."""

import collections
import pathlib
import re
import tempfile
from collections.abc import Callable

import jax


def kernel_times(call: Callable) -> tuple[float, list[tuple[str, float, int]]]:
    """Return (busy seconds, [(kernel, seconds, launches)] by time) of the first GPU during a call.

    call: returns arrays. Raises ValueError when the trace has no GPU.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(call())
        data = jax.profiler.ProfileData.from_file(
            str(next(pathlib.Path(folder).rglob("*.xplane.pb")))
        )
    plane = next((p for p in data.planes if p.name.startswith("/device:GPU")), None)
    if plane is None:
        raise ValueError("the trace has no GPU")
    total, count, spans = collections.Counter(), collections.Counter(), []
    for line in plane.lines:
        if not line.name.startswith("Stream"):
            continue
        for event in line.events:
            name = re.sub(r"_\d+(_\d+)?$", "", event.name)
            total[name] += event.duration_ns / 1e9
            count[name] += 1
            spans.append((event.start_ns, event.start_ns + event.duration_ns))
    busy, end = 0.0, 0.0
    for start, stop in sorted(spans):
        busy += max(0.0, stop - max(start, end)) / 1e9
        end = max(end, stop)
    return busy, [(name, seconds, count[name]) for name, seconds in total.most_common()]


def show(title: str, call: Callable, rows: int = 25) -> None:
    """Print the kernels of one call that take most time."""
    busy, kernels = kernel_times(call)
    print(f"{title}: device busy {1000 * busy:.1f} ms")
    for name, seconds, launches in kernels[:rows]:
        print(f"  {1000 * seconds:9.2f} ms {launches:6d} x  {name[:110]}")

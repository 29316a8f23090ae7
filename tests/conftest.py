"""Shared by all tests: eight simulated CPU devices, exact float32 products, the order of files, and
the marker `parity`.
"""

import atexit
import collections
import gc
import importlib.metadata
import os
import pathlib
import shutil
import signal
import tempfile

# The programs are small: compiling takes the time, a third less of it without LLVM's optimisations,
# of what remains 40 % less without the newer emitters of fusions, and then a tenth less with a
# program's code in one piece. Simulated devices wait for each other in collectives, and XLA ends
# the process where one is 40 seconds late, as on busy cores.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    " --xla_cpu_parallel_codegen_split_count=1"
    " --xla_cpu_collective_call_terminate_timeout_seconds=600"
)
# XLA ends the process where it does not know a flag, and that of 0.11 has only the newer emitters. The
# older ones of 0.10.0 round fp8 twice, those of 0.10.2 do not.
if importlib.metadata.version("jaxlib") == "0.10.2":
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# what one test compiled, the next one and the commands it runs reuse
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="compiled-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import importlib.util

import jax
import pytest

jax.config.update("jax_default_matmul_precision", "highest")
# what JAX keeps of its traces is searched for cycles less often: 5 % of the time
gc.set_threshold(10_000, 10, 10)
# ignored where a shell started the tests in the background
signal.signal(signal.SIGINT, signal.default_int_handler)


RESIDENT = int(os.environ.get("TESTS_RESIDENT_GIB", "3")) * 2**30


@pytest.fixture(autouse=True, scope="module")
def bounded_memory():
    """Drop what JAX has compiled after a file that leaves the process with more than `RESIDENT` bytes:
    the compilation cache has it still. Without this a process grows to 6 GiB.
    """
    yield
    try:
        resident = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    except OSError:  # not Linux
        return
    if resident * os.sysconf("SC_PAGE_SIZE") > RESIDENT:
        jax.clear_caches()
        gc.collect()


# The files that take longest, in this order, wherever they are: with `--no-loadscope-reorder` none of
# them begins when the rest is done.
FIRST = (
    "test_train",
    "test_train_here",
    "test_hosts",
    "test_tiny_wan",
    "test_policy_gradient",
    "test_true_width",
    "test_placement",
    "test_diffusers_pipeline",
    "test_peer",
    "test_rollout",
    "test_outages",
    "test_functions",
    "test_scale",
    "test_vae",
    "test_nft",
    "test_reward_head",
    "test_compare",
)


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what -m does not name
def pytest_collection_modifyitems(items):
    cases = collections.Counter()
    for item in items:
        marker = item.get_closest_marker("quick_cases")
        if marker is not None:
            function = item.nodeid.partition("[")[0]
            cases[function] += 1
            if cases[function] > marker.args[0]:
                item.add_marker(pytest.mark.slow)
    rank = {stem: i for i, stem in enumerate(FIRST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))
    # 16-bit floats, through which XLA converts fp8, have no instructions there, nor a function in XLA
    if "xla_cpu_max_isa=SSE4_2" in os.environ["XLA_FLAGS"]:
        skip = pytest.mark.skip(reason="XLA cannot convert fp8 with the instructions of SSE4.2")
        for item in items:
            if item.get_closest_marker("fp8"):
                item.add_marker(skip)
    missing = [
        name
        for name in ("torch", "diffusers", "transformers")
        if importlib.util.find_spec(name) is None
    ]
    if missing:
        skip = pytest.mark.skip(
            reason=f"live parity needs {', '.join(missing)}: pip install -e '.[parity]'"
        )
        for item in items:
            if "parity" in item.keywords:
                item.add_marker(skip)

"""Loads XLA's ROCm compiler without ROCm or a GPU, with stubs of the libraries that the plugin links
to.

The plugin contains the whole compiler (LLVM, LLD, Triton) and needs ROCm's libraries only to run
compiled functions. Every library that the loader does not find is replaced by a stub of the same
name, in which all functions report failure, so that the plugin loads. `mi300x` describes the devices
to compile for. Nothing can be executed this way.

Needs `jax[rocm7-local]`, a C compiler and readelf (Debian: gcc, binutils), on Linux with glibc.
"""

import ctypes
import importlib
import importlib.util
import pathlib
import re
import shutil
import subprocess
import tempfile
from unittest import mock

from grpo.compiled.device_kinds import MI300X_MEMORY

PLUGIN = "jax_plugins.xla_rocm7"
GLIBC = re.compile(r"(libc|libm|librt|libdl|libpthread|libgcc_s|libstdc\+\+|ld-linux-x86-64)\.so")

# The MI300X in XLA's own description (openxla/xla,
# xla/backends/gpu/target_config/specs/mi300.txtpb), except for the memory, which is AMD's, and the
# version of ROCm: without one XLA does not multiply in fp8.
MEMORY = MI300X_MEMORY
MI300X = f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 64 threads_per_core_limit: 2048
  shared_memory_per_block: 65536 shared_memory_per_block_optin: 65536 shared_memory_per_core: 65536
  core_count: 304 fpus_per_core: 128 clock_rate_ghz: 2.1
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65536 block_dim_limit_z: 65536
  memory_bandwidth: 6810000000000 l2_cache_size: 4194304 device_memory_size: {MEMORY}
  registers_per_core_limit: 131072 registers_per_block_limit: 131072
  rocm_compute_capability {{ gcn_arch_name: "gfx942:sramecc+:xnack-" }}
}}
runtime_version {{ major: 7 minor: 2 patch: 0 }}
platform_name: "ROCM"
device_description_str: "MI300X"
dnn_version_info {{}}
"""


def why_not() -> str | None:
    """Return what is missing on this machine to compile for ROCm; None: nothing."""
    try:
        plugin = importlib.util.find_spec(PLUGIN)
    except ModuleNotFoundError:  # no plugin of any kind
        plugin = None
    if plugin is None:
        return "JAX's ROCm plugin is not installed: bash scripts/test_rocm.sh"
    tools = [tool for tool in ("gcc", "readelf") if not shutil.which(tool)]
    return f"{' and '.join(tools)} not found: apt-get install gcc binutils" if tools else None


def load() -> None:
    """Register the ROCm plugin with JAX, to compile with. Call it once a process. Raises OSError
    where the plugin cannot be loaded.
    """
    libraries = []
    for name in (PLUGIN, "jax_rocm7_plugin"):
        spec = importlib.util.find_spec(name)
        for folder in getattr(spec, "submodule_search_locations", None) or ():
            libraries += sorted(pathlib.Path(folder).glob("*.so"))
    with tempfile.TemporaryDirectory() as folder:
        load_stubs(libraries, pathlib.Path(folder))
    # without an AMD GPU the plugin does not register
    with mock.patch("jax._src.hardware_utils.num_available_amd_gpus", lambda stop_at=None: 1):
        # reload: JAX may have imported it without the stubs
        importlib.reload(importlib.import_module(PLUGIN)).initialize()


def mi300x(count: int = 1) -> list:
    """Return `count` MI300X of one host, as devices to compile for."""
    from jax.experimental import topologies

    return topologies.get_topology_desc(
        "", "rocm", target_config=MI300X, topology=f"1x1x{count}"
    ).devices


def load_stubs(libraries: list[pathlib.Path], folder: pathlib.Path) -> None:
    """Build stubs in `folder` of the libraries that `libraries` need and the loader does not find,
    and load them into the process.
    """
    # the names of the missing libraries
    missing = []
    for library in libraries:
        for name in re.findall(r"\(NEEDED\).*\[(.+)\]", readelf("-d", library)):
            if name not in missing and not GLIBC.match(name) and not loads(name):
                missing.append(name)
    # the functions of each missing library: {library: {function: its version, '' without}}
    symbols = {name: {} for name in missing}
    system = [ctypes.CDLL(name) for name in (None, "libstdc++.so.6", "libm.so.6", "libgcc_s.so.1")]
    for library in libraries:
        owner = version_owners(library)
        for function, version in undefined(library):
            if owner.get(version) in symbols:
                symbols[owner[version]][function] = version
            elif not version and missing and not any(hasattr(lib, function) for lib in system):
                # all libraries share one namespace, so any of them can define it
                symbols[missing[0]][function] = ""
    # compile and load a stub of each
    for name, functions in symbols.items():
        path = folder / name
        source, script = path.with_suffix(".c"), path.with_suffix(".map")
        source.write_text("".join(map(stub, sorted(functions))))
        versions = sorted(set(functions.values()) - {""})
        script.write_text(
            "".join(
                f"{v} {{ global: {' '.join(f'{f};' for f in functions if functions[f] == v)} }};\n"
                for v in versions
            )
        )
        subprocess.run(
            [
                "gcc",
                "-shared",
                "-fPIC",
                "-w",
                "-o",
                path,
                source,
                f"-Wl,-soname,{name}",
                *([f"-Wl,--version-script={script}"] if versions else []),
            ],
            check=True,
        )
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


def stub(function: str) -> str:
    """Return the C source of a function that reports failure: hipErrorNoDevice in HIP, 1 in other
    libraries, a text where the function returns one.
    """
    if re.search(r"(GetErrorString|GetErrorName|_to_string|status_string)$", function):
        return f'const char* {function}(void) {{ return "no ROCm here"; }}\n'
    if function == "__hipRegisterFatBinary":  # called while the plugin loads; returns a handle
        return f"static void* handle; void** {function}(void) {{ return &handle; }}\n"
    return f"int {function}(void) {{ return {100 if function.startswith('hip') else 1}; }}\n"


def loads(name: str) -> bool:
    """Return whether the loader finds a library."""
    try:
        ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    return True


def undefined(library: pathlib.Path) -> list[tuple[str, str]]:
    """Return (symbol, version or '') of everything that a library needs from others, without weak
    references.
    """
    table = readelf("--dyn-syms", library)
    return re.findall(r" GLOBAL +DEFAULT +UND +([^@\s]+)@?@?(\S*)", table)


def version_owners(library: pathlib.Path) -> dict[str, str]:
    """Return {symbol version: name of the library that defines it} of what a library needs."""
    owners, current = {}, None
    for file, version in re.findall(r"Version: 1 +File: (\S+)|Name: (\S+)", readelf("-V", library)):
        current = file or current
        if version:
            owners[version] = current
    return owners


def readelf(option: str, library: pathlib.Path) -> str:
    """Return the output of readelf."""
    return subprocess.run(
        ["readelf", "-W", option, library], capture_output=True, text=True, check=True
    ).stdout

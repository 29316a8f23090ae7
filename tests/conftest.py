"""Shared by all tests: eight simulated CPU devices, exact float32 products, and the markers
`parity` and `slow`.
"""

import atexit
import gc
import os
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
    " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    " --xla_cpu_collective_call_terminate_timeout_seconds=600"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# what one test compiled, the next one and the commands it runs reuse
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="compiled-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import importlib.util

import jax
import pytest

jax.config.update("jax_default_matmul_precision", "highest")
# what JAX keeps of its traces is searched for cycles less often: 5 % of the time
gc.set_threshold(10_000, 10, 10)
# ignored where a shell started the tests in the background
signal.signal(signal.SIGINT, signal.default_int_handler)


# The files that take longest, in this order: with `--no-loadscope-reorder` none of them begins when
# the rest is done.
FIRST = (
    "grpo/test_train",
    "grpo/test_hosts",
    "test_tiny_wan",
    "grpo/test_update",
    "wan_jax/models/test_true_width",
    "grpo/compiled/test_placement",
    "wan_jax/inference/test_pipeline",
    "benchmarks/test_peer",
    "grpo/test_outages",
    "grpo/compiled/test_functions",
    "convert/test_scale",
    "wan_jax/models/test_vae",
    "grpo/methods/test_flow_matching",
    "grpo/test_reward_head",
    "grpo/test_compare",
)

# What `-m "not slow"` leaves out: files, or the tests of a file whose names begin so.
SLOW = {
    "benchmarks/test_peer": (),
    "grpo/test_reward_head": (),
    "wan_jax/models/test_true_width": ("velocity",),
    "rocm/test_compile": (),
    "rocm/test_lowering": ("training", "text_encoder", "ti2v"),
    "test_tiny_wan": ("training_shows", "diffusers_samples"),
    "grpo/test_train": (
        "evaluation",
        "killed",
        "ctrl_c",
        "sigterm",
        "full_fine",
        "starts_from",
        "workers",
        "servers",
        "both_experts",
        "two_experts",
        "one_expert",
        "divergence",
        "a_run",
        "a_budget",
    ),
    "grpo/test_hosts": ("both", "as_in_one", "the_first", "faults", "an_error"),
    "grpo/test_update": (
        "rollout_keeps",
        "loss_and_gradient",
        "first_update_in_bfloat16",
        "optimiser_and",
        "micro_batches",
        "every_form",
        "branches",
        "every_row",
        "kl_at_sampling",
        "dpm_solver",
        "guidance_is",
        "the_kl",
    ),
    "grpo/compiled/test_placement": ("eight_devices", "weights_are_gathered"),
    "grpo/compiled/test_functions": ("the_loop", "groups_sampled", "one_step"),
    "grpo/methods/test_flow_matching": ("loss_and_gradient", "nft_samples", "online_dpo"),
    "grpo/test_outages": ("one_video", "a_", "an_", "without", "sigterm", "videos_that"),
    "grpo/test_learns": (),
    "grpo/test_no_spread": ("a_whole_run",),
    "grpo/settings/test_agreement": ("two_processes",),
    "benchmarks/test_damage": ("damage_is",),
    "grpo/settings/test_frame_schedule": ("clips_grow",),
    "grpo/test_plan": ("command_line",),
    "grpo/test_compare": ("real_runs", "sigterm", "stopping"),
    "wan_jax/inference/test_pipeline": (
        "latents",
        "two_experts",
        "trained",
        "ti2v",
        "offloaded",
        "guidance",
        "export",
        "decoding",
    ),
    "wan_jax/models/test_vae": (
        "diffusers",
        "the_first",
        "single_frames",
        "later_frames",
        "videos_of",
        "bfloat16",
    ),
    "wan_jax/models/test_vae_chunks": ("chunks_are", "the_history", "the_estimate", "tiles_of"),
    "convert/test_scale": ("memory", "arrays", "a_killed", "two_conversions"),
    "rewards/remote/test_client": ("a_server", "when_all", "a_restart"),
    "rewards/test_scorers": ("workers_end", "ocr_workers"),
}


def is_slow(item) -> bool:
    file, _, name = item.nodeid.removeprefix("tests/").partition(".py::")
    return file in SLOW and (
        not SLOW[file] or name.startswith(tuple(f"test_{begin}" for begin in SLOW[file]))
    )


def pytest_collection_modifyitems(items):
    for item in items:
        if is_slow(item):
            item.add_marker("slow")
    rank = {f"tests/{name}.py": i for i, name in enumerate(FIRST)}
    items.sort(key=lambda item: rank.get(item.nodeid.partition("::")[0], len(rank)))
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

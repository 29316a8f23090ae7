# Source this before training on AMD Instinct MI300X. docs/howto/rocm.md has the origin of each value.
_flags=(
  --xla_gpu_enable_latency_hiding_scheduler=true
  --xla_gpu_enable_cublaslt=true                    # hipBLASLt
  --xla_gpu_enable_triton_gemm=false
  --xla_gpu_autotune_level=5
  --xla_gpu_enable_command_buffer=                  # none
  --xla_gpu_memory_limit_slop_factor=95
  --xla_gpu_all_gather_combine_threshold_bytes=134217728
  --xla_gpu_reduce_scatter_combine_threshold_bytes=134217728
  --xla_gpu_enable_all_gather_combine_by_dim=false
  --xla_gpu_enable_reduce_scatter_combine_by_dim=false
)
export XLA_FLAGS="${XLA_FLAGS:-} ${_flags[*]}"
unset _flags
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-.95}
export HSA_NO_SCRATCH_RECLAIM=1 HSA_FORCE_FINE_GRAIN_PCIE=1 GPU_MAX_HW_QUEUES=2 HIP_FORCE_DEV_KERNARG=1
export MIOPEN_CUSTOM_CACHE_DIR=${MIOPEN_CUSTOM_CACHE_DIR:-$HOME/.cache/wan_jax/miopen}

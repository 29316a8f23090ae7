# AMD Instinct GPUs, ROCm 7.2. Written without an AMD machine; docs/howto/rocm.md says what was verified.
#   docker build -f docker/rocm.Dockerfile -t wan-jax-grpo:rocm .
#   docker run --device=/dev/kfd --device=/dev/dri --group-add video --security-opt seccomp=unconfined --shm-size=64g \
#     -v "$PWD/models:/app/models" -v "$PWD/runs:/app/runs" wan-jax-grpo:rocm \
#     python -m grpo.train --config=configs/wan21_14b_ocr.py
FROM rocm/dev-ubuntu-24.04:7.2-complete

# python, what OpenCV (OCR) links to, and ROCm's libraries that JAX's plugin links to, should the image lack one
RUN apt-get update && apt-get install -y --no-install-recommends python3-venv libgl1 libglib2.0-0 \
      hipblas hipblaslt hipfft hipsolver hipsparse miopen-hip rccl rocblas rocm-smi-lib rocprofiler-sdk rocsolver \
    && rm -rf /var/lib/apt/lists/*

ENV PATH=/opt/venv/bin:$PATH
WORKDIR /app
COPY . .
# the versions that the test suite runs with
RUN python3 -m venv /opt/venv && pip install --no-cache-dir -c constraints.txt -e '.[rocm]'

# the image is no good unless the plugin finds every library
RUN python -c "import ctypes, importlib.util as u, pathlib as p; ctypes.CDLL(str(p.Path(u.find_spec('jax_plugins.xla_rocm7').origin).with_name('xla_rocm_plugin.so')))"

ENTRYPOINT ["bash", "-c", "source scripts/rocm_env.sh && exec \"$@\"", "--"]
CMD ["python", "-c", "import jax; print(jax.devices())"]

# NVIDIA GPUs; CUDA's libraries come with JAX, the host needs a driver for CUDA 13. docs/howto/rocm.md says what was verified.
#   docker build -f docker/cuda.Dockerfile -t wan-jax-grpo:cuda .
#   docker run --gpus all --shm-size=16g -v "$PWD/models:/app/models" -v "$PWD/runs:/app/runs" wan-jax-grpo:cuda \
#     python -m grpo.train --config=configs/wan21_14b_ocr.py
FROM python:3.13-slim-trixie

# what OpenCV (OCR) links to
RUN apt-get update && apt-get install -y --no-install-recommends libgl1 libglib2.0-0 && rm -rf /var/lib/apt/lists/*

WORKDIR /app
COPY . .
# the versions that the test suite runs with
RUN pip install --no-cache-dir -c constraints.txt -e '.[cuda]'

CMD ["python", "-c", "import jax; print(jax.devices())"]

"""Kinds of devices with their peak rates and memory, as their vendors state them. Imports no JAX."""

import dataclasses
import re

from wan_jax.errors import UserError

GIB = 2**30
MI300X_MEMORY = 192 * 10**9
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*GiB", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of device.

    Attributes:
        label: its name; each word of it is a word of JAX's `device_kind`.
        platform: as `attention.platform_of` names it.
        memory: bytes; None: of the CPU, which has no memory of its own.
        bf16: dense peak rate of bf16 products summed in fp32, without sparsity, FLOP/s; 0: unknown.
        fp32: the same of fp32 products as XLA runs them by default: TF32 on NVIDIA, fp32 matrix
            cores on AMD.
        fp8: whether it multiplies in 8 bits (`model.weights=fp8`).
    """

    label: str
    platform: str
    memory: int | None
    bf16: float
    fp32: float
    fp8: bool = True


# Rates are of data sheets without sparsity; NVIDIA's state most of them with it, twice as high.
# Memory on NVIDIA is what CUDA leaves of the stated size, in whole GiB; on AMD the stated size.
# Only the H200's was seen at work (docs/results.md).
KINDS = {
    # NVIDIA A100 Tensor Core GPU data sheet (nvidia-1758950): 312 TFLOPS bf16, 156 TF32
    "a100-40": Kind("A100 40GB", "cuda", 39 * GIB, 312e12, 156e12, fp8=False),
    "a100-80": Kind("A100 80GB", "cuda", 79 * GIB, 312e12, 156e12, fp8=False),
    # NVIDIA H100 and H200 data sheets, SXM: 1,979 TFLOPS bf16 and 989 TF32 with sparsity
    "h100": Kind("H100", "cuda", 79 * GIB, 989e12, 495e12),
    "h200": Kind("H200", "cuda", 139 * GIB, 989e12, 495e12),
    # NVIDIA L40S data sheet: 362.05 TFLOPS bf16, 183 TF32, 48 GB with ECC
    "l40s": Kind("L40S", "cuda", 44 * GIB, 362e12, 183e12),
    # NVIDIA Blackwell architecture brief, HGX B200 at 1000 W: 2.25 PFLOPS bf16, 1.1 TF32, 180 GB
    "b200": Kind("B200", "cuda", 178 * GIB, 2250e12, 1100e12),
    # NVIDIA Ada GPU architecture paper, table of GeForce RTX 4090: 165.2 TFLOPS bf16, 82.6 TF32
    "rtx4090": Kind("RTX 4090", "cuda", 23 * GIB, 165e12, 82.6e12),
    # NVIDIA RTX Blackwell GPU architecture paper, RTX 5090: 209.5 TFLOPS bf16, 104.8 TF32
    "rtx5090": Kind("RTX 5090", "cuda", 31 * GIB, 209e12, 105e12),
    # AMD Instinct MI300X and MI325X data sheets: 1,307.4 TFLOPS bf16, 163.4 fp32 matrix
    "mi300x": Kind("MI300X", "rocm", MI300X_MEMORY, 1307e12, 163e12),
    "mi325x": Kind("MI325X", "rocm", 256 * 10**9, 1307e12, 163e12),
}
NAMES = f"{', '.join(KINDS)}, or a memory such as 24GiB"


def named(device: str) -> Kind:
    """Return the kind of a name of `KINDS`, or one of a memory, whose rates are unknown. Raises
    `UserError` on other names.
    """
    if device.lower() in KINDS:
        return KINDS[device.lower()]
    size = SIZE.fullmatch(device)
    if size is None or not float(size[1]):
        raise UserError(f"--device={device} is unknown: give here, {NAMES}")
    return Kind(f"GPU of {size[1]} GiB", "cuda", int(float(size[1]) * GIB), 0.0, 0.0)


def matching(device_kind: str) -> Kind | None:
    """Return the kind that JAX's `device_kind` names; None where its rates are unknown."""
    words = set(re.split(r"[^A-Z0-9]+", device_kind.upper()))
    kinds = (kind for kind in KINDS.values() if set(kind.label.split()) <= words)
    return None if "LAPTOP" in words else next(kinds, None)

"""What lowered and compiled programs are made of."""

import pathlib
import re
import struct
from collections import Counter

# In StableHLO, where a name is what the program asks for: a Triton kernel, and nothing of a vendor,
# no callback.
LOWERED = {"__gpu$xla.gpu.triton"}
# In XLA's output, which calls AMD's libraries by NVIDIA's names: hipBLASLt, MIOpen's convolution,
# Triton kernels.
COMPILED = {
    "__cublas$lt$matmul",
    "__cublas$lt$matmul$f8",
    "__cudnn$convForward",
    "__gpu$xla.gpu.triton",
}
COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
AMDGPU, GFX942 = 224, 0x4C  # e_machine, and the low byte of e_flags


def lowered_targets(text: str) -> set[str]:
    """The custom calls of StableHLO."""
    return set(re.findall(r'custom_call @"?([^\s"(]+)', text))


def compiled_targets(text: str) -> set[str]:
    """The custom calls of optimised HLO."""
    return set(re.findall(r'custom_call_target="([^"]+)"', text))


def collectives(text: str) -> Counter:
    """How often each collective stands in optimised HLO; in a loop it counts once."""
    return Counter(re.findall(rf" ({'|'.join(COLLECTIVES)})(?:-start)?\(", text))


def products(text: str) -> Counter:
    """The library's products in optimised HLO: type and shape, and what is part of them (BIAS,
    BIAS_GELU, ...).
    """
    calls = r'= \((\w+\[[\d,]+\]).*custom_call_target="__cublas\$lt\$matmul".*?"epilogue":"(\w+)"'
    return Counter(re.findall(calls, text))


def square_buffers(text: str, tokens: int) -> set[str]:
    """Arrays of optimised HLO with a value for every pair of a video's tokens: two axes of that
    length, or a little more where a backend pads.
    """
    shapes = set(re.findall(r"\b(?:f32|bf16|f16|pred|s32|u32)\[([\d,]+)\]", text))
    return {
        shape
        for shape in shapes
        if sum(tokens <= int(n) < tokens + 128 for n in shape.split(",")) > 1
    }


def is_gfx942(code_object: pathlib.Path) -> bool:
    """Whether the file is an ELF code object for MI300X (gfx942)."""
    head = code_object.read_bytes()[:64]
    if head[:4] != b"\x7fELF":
        return False
    (machine,), (flags,) = struct.unpack_from("<H", head, 18), struct.unpack_from("<I", head, 48)
    return machine == AMDGPU and flags & 0xFF == GFX942

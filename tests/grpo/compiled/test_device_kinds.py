"""Kinds of devices against the names that JAX reports and what their vendors state."""

import pytest

from grpo.compiled.device_kinds import GIB, KINDS, matching, named


@pytest.mark.parametrize(
    ("device_kind", "name"),
    [
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100 80GB PCIe", "a100-80"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 5090", "rtx5090"),
        ("AMD Instinct MI300X", "mi300x"),
        ("AMD Instinct MI325X OAM", "mi325x"),
    ],
)
def test_a_device_is_recognised(device_kind, name):
    assert matching(device_kind) is KINDS[name] is named(name.upper())


@pytest.mark.parametrize(
    "device_kind",
    [
        "NVIDIA L40",
        "NVIDIA GB200",
        "NVIDIA GH200 480GB",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "cpu",
    ],
)
def test_other_devices_have_unknown_rates(device_kind):
    assert matching(device_kind) is None


def test_a_memory():
    kind = named("47.5gib")
    assert (kind.memory, kind.bf16, kind.fp32) == (int(47.5 * GIB), 0, 0)
    assert all(kind.memory and kind.bf16 > kind.fp32 > 0 for kind in KINDS.values())

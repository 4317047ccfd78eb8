"""The denominator of MFU: right by the device's name, or none."""

import pytest

from vlm.cost.hardware import peak_tflops

NAMES = {
    "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H800": 989,
    "NVIDIA H200": 989,
    "NVIDIA H20": 148,
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA A100 80GB PCIe": 312,
    "NVIDIA A800-SXM4-40GB": 312,
    "NVIDIA L40S": 362,
    "NVIDIA B200": 2250,
}
UNKNOWN = [
    "cpu",
    "NVIDIA H100 NVL",  # slower than both other boards
    "NVIDIA H100 80GB HBM3 MIG 1g.10gb",  # a seventh of one
    "NVIDIA GH200 480GB",
    "NVIDIA L40",
    "NVIDIA GeForce RTX 4090",
    "Tesla V100-SXM2-16GB",
    "AMD Instinct MI300X",
]


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_peak_of_a_known_board(name):
    assert peak_tflops(name, "bfloat16") == NAMES[name]


@pytest.mark.parametrize("name", UNKNOWN)
def test_no_peak_rather_than_a_wrong_one(name):
    assert peak_tflops(name, "bfloat16") is None


def test_float32_has_a_peak_of_its_own():
    assert peak_tflops("NVIDIA H100 80GB HBM3", "float32") == 67
    assert peak_tflops("NVIDIA B200", "float32") is None

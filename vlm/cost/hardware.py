"""Peak speed of a device by its name: the denominator of MFU. Unknown devices have none."""

import re

PEAKS = {
    "a100": 312,
    "a800": 312,
    "h20": 148,
    "h100": 989,
    "h100_pcie": 756,
    "h200": 989,
    "h800": 989,
    "b200": 2250,
    "l40s": 362,
}
"""Dense bfloat16 TFLOP/s of NVIDIA's data sheets, without their factor of two for sparsity;
h100, h200 and h800 are the SXM boards."""
FLOAT32_PEAKS = {"a100": 19.5, "a800": 19.5, "h20": 44, "h100": 67, "h100_pcie": 51, "h200": 67}
"""Likewise of float32 without TF32, which torch leaves off."""
OTHER_BOARDS = {"pcie", "nvl", "mig"}
"""Words of a name that mean less than the full board."""
ALIKE = {"a100", "a800"}
"""As fast as PCIe boards."""


def board_of(device_name: str) -> str | None:
    """The key of `PEAKS` that `torch.cuda.get_device_name()` means; None where none does.

    A share of a device (MIG) and a board whose peak is not listed have none: no MFU is better
    than a wrong one.
    """
    words = re.split(r"[\s_-]+", device_name.lower())
    boards = [word for word in words if word in PEAKS]
    if len(boards) != 1:
        return None
    (board,) = boards
    for word in OTHER_BOARDS.intersection(words):
        if word == "pcie" and board in ALIKE:
            continue
        board = f"{board}_{word}"
    return board if board in PEAKS else None


def peak_tflops(device_name: str, dtype: str) -> float | None:
    """TFLOP/s of one device in `bfloat16` or `float32`; None where it is not known."""
    peaks = {"bfloat16": PEAKS, "float32": FLOAT32_PEAKS}[dtype]
    return peaks.get(board_of(device_name))

"""How far the predicted time of a micro-batch is from its real one.

    python -m bench.calibrate

`vlm/cost/calibrate.py` finds the seconds per FLOP of each module from four micro-batches of one
kind each, and predicts a mixed one that none of them is: here at an eighth of the 8B hybrid's
width, in float32 on one thread of a CPU, in bfloat16 on an NVIDIA GPU. Each round calibrates both
stages anew, and in each calibration its micro-batches take turns. Off is |predicted / measured -
1|.
"""

import sys
from collections.abc import Sequence

import torch

from bench.common import ROUNDS, arguments, interleaved, print_table, summary, write_result
from bench.recompute import CONFIG
from vlm.cost.calibrate import calibrate
from vlm.cost.report import STAGES

OFF = 0.1
SIZES = (1024, 32)
"""Tokens of a micro-batch, and the side of an image in patches."""
POLICY = "full"
"""Of recomputation, the default of training."""


def predicted(stage: int, tokens: int, side: int) -> float:
    """Seconds of the mixed micro-batch / its real ones."""
    on_cuda = torch.cuda.is_available()
    dtype, device = (torch.bfloat16, "cuda") if on_cuda else (torch.float32, "cpu")
    setting = POLICY, dtype, torch.device(device)
    check = calibrate(CONFIG, STAGES[stage], *setting, tokens, side)["check"]
    return check["predicted"] / check["measured"]


def main(given: Sequence[str] | None = None) -> int:
    options = arguments("calibrate", __doc__).parse_args(given)
    torch.set_num_threads(1)
    sizes, rounds = ((128, 4), 1) if options.quick else (SIZES, ROUNDS)
    measures = {str(stage): lambda stage=stage: predicted(stage, *sizes) for stage in STAGES}
    rows = [
        {
            "stage": int(stage),
            "predicted / measured": summary(found),
            "off": summary(abs(ratio - 1) for ratio in found),
        }
        for stage, found in interleaved(rounds, measures).items()
    ]
    print_table(rows)
    write_result(
        "calibrate",
        options,
        what=f"predicted / real seconds of a mixed micro-batch of up to {sizes[0]:,} tokens, "
        f"forward and backward, recomputing {POLICY}, from the seconds per FLOP of four others",
        target={"predicted time": f"within {OFF:.0%} of the real one, in both stages"},
        figures=rows,
        spread=f"least and most of {rounds} rounds in which the stages take turns",
        refuted_by="python -m bench.calibrate on an idle machine: a median further off",
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

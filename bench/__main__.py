"""All of bench/ but the peers, one script after the other; then bench/README.md is made anew.

    python -m bench [--quick] [NAME ...]

One that fails is told at the end, and the others run all the same.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence

import torch

from bench.common import ROOT

SCRIPTS = (
    "flops",
    "plan",
    "linear",
    "calibrate",
    "loss_memory",
    "recompute",
    "syncs",
    "startup",
    "index",
    "image",
    "checkpoint",
    "graft_full_size",
    "miniature",
    "gpu_ceilings",
    "gpu_stage2",
    "gpu_stage1",
)
NEEDS_GPU = "gpu_"
"""Scripts that run with their smallest sizes where there is no GPU."""


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("scripts", nargs="*", metavar="NAME", help=f"of {', '.join(SCRIPTS)}")
    parser.add_argument("--quick", action="store_true", help="the smallest sizes, no results")
    options = parser.parse_args(given)
    if unknown := set(options.scripts) - set(SCRIPTS):
        parser.error(f"there is no script {', '.join(sorted(unknown))} here")
    failed, began = [], time.monotonic()
    for name in options.scripts or SCRIPTS:
        quick = options.quick or (name.startswith(NEEDS_GPU) and not torch.cuda.is_available())
        command = ["-m", f"bench.{name}", *["--quick"] * quick]
        print(f"\n$ python {' '.join(command)}", flush=True)
        if subprocess.run([sys.executable, *command], cwd=ROOT).returncode:
            failed.append(name)
    if not options.quick:
        subprocess.run([sys.executable, "-m", "bench.table"], cwd=ROOT, check=True)
    print(f"{(time.monotonic() - began) / 60:.1f} minutes")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())

"""How often the host waits for the device in a run of training.

    python -m bench.syncs

A tiny model trains for some steps in each stage, on whatever device there is. Counted are values
that the host reads, and operations whose result's shape depends on values (bench/reads.py): on a
GPU each of them waits until the device has done all before it. On a CPU nothing waits, but the
same calls are made. With DeepSpeed on several ranks tests/train/test_syncs.py counts them.
"""

import contextlib
import io
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import torch

from bench.common import arguments, print_table, write_result
from bench.peers.setting import Setting, write_setting
from bench.reads import Reads
from train.config import TrainConfig
from train.engine import PlainEngine
from train.sft import train
from train.world import World

STAGES = {
    "stage 1": {"freeze_vit": True, "freeze_llm": True},
    "stage 2": {},
    "stage 2, gradient_checkpointing": {"gradient_checkpointing": True},
}


def counts(setting: Setting, out: Path, options: dict) -> dict[str, float]:
    """Of one run."""
    config = TrainConfig(
        model=setting.model,
        dataset=[str(setting.sequence)],
        output_dir=out,
        max_steps=setting.steps,
        max_length=2048,
        token_budget=2048,  # several micro-batches a step
        deepspeed=None,
        dataloader_num_workers=0,
        dataset_num_proc=1,
        logging_steps=1,
        save_steps=10_000,
        **{"dtype": "float32", "gradient_checkpointing": False} | options,
    )
    honest, micro_steps = PlainEngine.backward, []

    def backward(engine: PlainEngine, loss: torch.Tensor) -> None:
        micro_steps.append(1)
        honest(engine, loss)

    quiet = contextlib.redirect_stdout(io.StringIO())
    with mock.patch.object(PlainEngine, "backward", backward), Reads() as reads, quiet:
        train(config, World.start())
    return {
        "steps": setting.steps,
        "micro-steps": len(micro_steps),
        "syncs a micro-step": len(reads.micro_steps) / len(micro_steps),
        "syncs a step": len(reads.steps) / setting.steps,
    }


def main(given: Sequence[str] | None = None) -> int:
    options = arguments("syncs", __doc__).parse_args(given)
    names = list(STAGES)[:1] if options.quick else list(STAGES)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        setting = write_setting(Path(folder), "tiny", 1, 2 if options.quick else 4)
        for name in names:
            out = Path(folder) / name.replace(" ", "-")
            rows.append({"run": name} | counts(setting, out, STAGES[name]))
    print_table(rows)
    write_result(
        "syncs",
        options,
        what="reads of the device by the host, counted in runs of a tiny model by one process",
        target={"micro-step": "0", "optimiser step": "1"},
        figures=rows,
        spread="none: a count is the same in every run",
        refuted_by="a profile of a run on a GPU (train/sft.py --profile true) that shows a "
        "cudaStreamSynchronize or a copy to the host inside a micro-step",
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

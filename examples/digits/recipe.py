"""A graft and the two stages after it, in a folder: the exact one's, or the literal one's."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from examples.digits.processes import RANKS, run, start

HELD_OUT = 128
"""Questions that each stage is evaluated on while it trains."""
EVAL_STEPS = "300"


@dataclass(frozen=True)
class Recipe:
    """Where one run of the recipe lies, and how its graft is made."""

    out: Path
    data: Path
    donors: Path
    variant: Literal["exact", "literal"] = "exact"

    @property
    def graft_dir(self) -> Path:
        return self.out / "graft"

    def graft(self) -> Path:
        """Join the donors; returns the model."""
        donors = ("--vision", self.donors / "vision", "--llm", self.donors / "llm")
        how = () if self.variant == "exact" else ("--variant", self.variant)
        run("-m", "vlm.graft", "build", *donors, "--out", self.graft_dir, *how)
        return self.graft_dir

    def train(self, stage: str, model: Path) -> Path:
        """A stage through train/sft.py on two ranks; returns the model that it leaves."""
        run(
            *("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(RANKS)),
            *("train/sft.py", "--config", f"configs/demo/{stage}.yaml"),
            *("--model", model, "--dataset", self.data / f"{stage}.jsonl"),
            *("--val_dataset", f"{self.data / 'held_out.jsonl'}#{HELD_OUT}"),
            *("--text_probe", f"{self.data / 'held_out_text.jsonl'}#{HELD_OUT}"),
            *("--eval_steps", EVAL_STEPS),
            *("--output_dir", self.out / stage),
            threads=1,
        )
        latest = (self.out / stage / "latest").read_text().strip()
        return self.out / stage / latest / "model"

    def score(self, models: dict[str, Path]) -> dict[str, dict]:
        """Every checkpoint's answers and losses; two at a time, one thread each."""
        files = {name: self.out / f"score_{name}.json" for name in models}
        waiting = list(models)
        while waiting:
            pair, waiting = waiting[:RANKS], waiting[RANKS:]
            children = [
                start(
                    *("-m", "examples.digits.score", "--model", models[name]),
                    *("--data", self.data, "--out", files[name]),
                    threads=1,
                )
                for name in pair
            ]
            for name, child in zip(pair, children, strict=True):
                if child.wait():
                    raise SystemExit(f"scoring {name} failed (see above)")
        return {name: json.loads(file.read_text()) for name, file in files.items()}

"""The miniature recipe on random donors, and its golden loss curves.

    python -m tests.train.golden_curves      # renews tests/golden/curves/

Everything is run as a user runs it: the graft, then stage 1, then stage 2 from stage 1's model,
in float32, packed, on one process. Donors have the shapes of the demo's, but are not trained.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from examples.digits import donor_files
from examples.digits.make_data import make_data
from examples.digits.vocabulary import extend_tokenizer, train_tokenizer
from tests.tiny import randomise
from tests.train.runs import ROOT, environment, log_of
from vlm.checkpoint import write_json
from vlm.hf_config import parse_config, parse_text_config
from vlm.model import LanguageModel, VisionLanguageModel

CURVES = ROOT / "tests" / "golden" / "curves"
STAGES = ("stage1", "stage2")
SAMPLES = {"stage1": 256, "stage2": 128}
"""Of each stage's file: 16 steps of 16, in one epoch and in two."""
OPTIONS = {"global_batch_size": 16, "dataloader_num_workers": 0, "logging_steps": 1}
"""What differs from configs/demo/, where two ranks have 8 samples each."""


def train_both_stages(folder: Path) -> dict[str, list[dict[str, float]]]:
    """Loss and gradient norm of every step, by stage; `folder` is left full of their files."""
    _write_donors(folder)
    make_data(folder / "data", SAMPLES["stage1"], SAMPLES["stage2"], held_out=0)
    model = folder / "graft"
    donors = ("--vision", folder / "vision", "--llm", folder / "llm")
    _run("-m", "vlm.graft", "build", *donors, "--out", model)
    curves = {}
    for stage in STAGES:
        out = folder / stage
        flags = [word for name, value in OPTIONS.items() for word in (f"--{name}", value)]
        _run(
            *("train/sft.py", "--config", f"configs/demo/{stage}.yaml", "--model", model),
            *("--dataset", folder / "data" / f"{stage}.jsonl", "--output_dir", out, *flags),
        )
        steps = [line for line in log_of(out) if line["event"] == "train"]
        curves[stage] = [{name: s[name] for name in ("step", "loss", "grad_norm")} for s in steps]
        model = out / (out / "latest").read_text().strip() / "model"
    return curves


def _write_donors(folder: Path) -> None:
    tokenizer = train_tokenizer()
    raw = donor_files.vision_config(tokenizer)
    model = VisionLanguageModel(parse_config(raw))
    randomise(model, seed=1)
    donor_files.write_vision_donor(folder / "vision", model, raw, tokenizer)
    tokenizer = extend_tokenizer(tokenizer)
    raw = donor_files.llm_config(tokenizer)
    model = LanguageModel(parse_text_config(raw))
    randomise(model, seed=2)
    donor_files.write_llm_donor(folder / "llm", model, raw, tokenizer)


def _run(*arguments: object) -> None:
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        curves = train_both_stages(Path(folder))
    for stage, curve in curves.items():
        write_json(CURVES / f"{stage}.json", curve)
        print(f"{stage}: loss {curve[0]['loss']:.4f} -> {curve[-1]['loss']:.4f}")


if __name__ == "__main__":
    main()

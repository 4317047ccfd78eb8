"""The plan carried out: tensor by tensor from safetensors to safetensors."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from vlm.checkpoint import TensorReader, save_model, write_json
from vlm.graft.plan import EMBEDDING, MERGER, Step, derive_config, plan_tensors
from vlm.graft.report import REPORT, describe
from vlm.graft.tokenizer import choose_tokenizer, write_companions
from vlm.hf_config import ConfigError, parse_config, parse_text_config, read_json
from vlm.model import initialise
from vlm.vision import PatchMerger


def build(vision_dir: Path, llm_dir: Path, out_dir: Path, seed: int = 0) -> dict:
    """Graft the vision donor's tower onto the language donor; returns the report.

    Everything is checked before the first byte is written, and `out_dir` appears whole or not
    at all.

    Args:
        seed: of the fresh merger; the same seed gives the same bytes.

    Raises:
        ConfigError, CheckpointError: one sentence about what does not fit.
    """
    if Path(out_dir).exists():
        raise ConfigError(f"{out_dir} exists; remove it or choose another --out")
    vision_raw, llm_raw = (read_json(Path(d) / "config.json") for d in (vision_dir, llm_dir))
    parse_config(vision_raw, Path(vision_dir) / "config.json")
    llm_config = parse_text_config(llm_raw, Path(llm_dir) / "config.json")
    choice = choose_tokenizer(Path(vision_dir), Path(llm_dir))
    config = derive_config(vision_raw, llm_raw, max(llm_config.vocab_size, choice.size))
    vision, llm = TensorReader(vision_dir), TensorReader(llm_dir)
    steps = plan_tensors(config, vision, llm)
    fresh = fresh_tensors(steps, config, seed, llm.get(EMBEDDING).dtype)
    report = describe(steps, config, choice, fresh, Path(vision_dir), Path(llm_dir), seed)
    with tempfile.TemporaryDirectory() as folder:
        companions = Path(folder)
        write_companions(companions, choice, Path(vision_dir))
        write_json(companions / REPORT, report)
        save_model(out_dir, carry_out(steps, fresh, vision, llm), companions, config)
    return report


def fresh_tensors(
    steps: list[Step], config: dict, seed: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The merger, and the rows that new tokens add, from one seed."""
    generator = torch.Generator().manual_seed(seed)
    merger = PatchMerger(parse_config(config).vision)
    initialise(merger, generator, config["vision_config"].get("initializer_range", 0.02))
    fresh = {MERGER + name: tensor.to(dtype) for name, tensor in merger.state_dict().items()}
    std = config["text_config"].get("initializer_range", 0.02)
    for step in steps:
        if step.action == "resized":
            rows = torch.empty(step.added_rows, step.shape[1])
            fresh[step.name] = rows.normal_(0.0, std, generator=generator).to(dtype)
    return fresh


def carry_out(
    steps: list[Step], fresh: dict[str, Tensor], vision: TensorReader, llm: TensorReader
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the hybrid, in the plan's order."""
    readers = {"vision": vision, "llm": llm}
    for step in steps:
        if step.action == "copied":
            yield step.name, readers[step.donor].get(step.name)
        elif step.action == "initialised":
            yield step.name, fresh[step.name]
        elif step.action == "resized":
            held = readers[step.donor].get(step.name)
            yield step.name, torch.cat([held, fresh[step.name].to(held.dtype)])

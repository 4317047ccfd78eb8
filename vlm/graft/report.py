"""The account of a graft: what became of every tensor, as a table and as `graft_report.json`."""

import hashlib
from math import prod
from pathlib import Path

from torch import Tensor

from vlm.graft.plan import EMBEDDING, HEAD, MERGER, Step
from vlm.graft.tokenizer import TokenizerChoice

REPORT = "graft_report.json"
ACTIONS = ("copied", "initialised", "resized", "dropped")


def describe(
    steps: list[Step],
    config: dict,
    choice: TokenizerChoice,
    fresh: dict[str, Tensor],
    vision_dir: Path,
    llm_dir: Path,
    seed: int,
) -> dict:
    """The report as a JSON object: donors, config, tokenizer, every tensor's fate."""
    tensors = []
    for step in steps:
        row = {
            "name": step.name,
            "module": module_of(step),
            "action": step.action,
            "donor": step.donor,
            "shape": list(step.shape),
            "reason": step.reason,
        }
        if step.name in fresh and step.action != "dropped":
            values = fresh[step.name].float()
            row |= {"mean": values.mean().item(), "std": values.std(correction=0).item()}
        tensors.append(row)
    return {
        "donors": {"vision": _identity(vision_dir), "llm": _identity(llm_dir)},
        "seed": seed,
        "tokenizer": {
            "donor": choice.donor,
            "size": choice.size,
            "shared": choice.shared,
            "only_llm": choice.only_llm,
            "only_vision": choice.only_vision,
        },
        "mrope_section": config["text_config"]["rope_parameters"]["mrope_section"],
        "tie_word_embeddings": config["tie_word_embeddings"],
        "tensors": tensors,
    }


def module_of(step: Step) -> str:
    """The part of the model that a tensor belongs to, for the table."""
    if step.name.startswith(MERGER):
        return "merger"
    if step.name.startswith("model.visual."):
        return "vision tower"
    if step.name == HEAD:
        return "head"
    return "embedding" if step.name == EMBEDDING else "decoder"


def print_account(report: dict) -> None:
    """The report as a table: modules x actions, tensors and parameters."""
    totals: dict[tuple[str, str, str], list[int]] = {}
    for row in report["tensors"]:
        origin = row["donor"] or "fresh"
        entry = totals.setdefault((row["module"], row["action"], origin), [0, 0])
        entry[0] += 1
        entry[1] += prod(row["shape"])
    print(f"{'module':14}{'action':13}{'from':9}{'tensors':>8}{'parameters':>17}")
    order = sorted(totals.items(), key=lambda item: ACTIONS.index(item[0][1]))
    for (module, action, origin), (count, parameters) in order:
        print(f"{module:14}{action:13}{origin:9}{count:8}{parameters:17,}")
    kept = [row for row in report["tensors"] if row["action"] != "dropped"]
    print(f"{'hybrid':36}{len(kept):8}{sum(prod(row['shape']) for row in kept):17,}")
    tokenizer = report["tokenizer"]
    print(
        f"tokenizer: the {tokenizer['donor']} donor's, {tokenizer['shared']} tokens shared, "
        f"{len(tokenizer['only_llm'])} only in the LLM's, "
        f"{len(tokenizer['only_vision'])} only in the vision donor's"
    )


def _identity(folder: Path) -> dict:
    config = (folder / "config.json").read_bytes()
    return {"path": str(folder), "config_sha256": hashlib.sha256(config).hexdigest()}

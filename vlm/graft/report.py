"""The account of a graft: what became of every tensor, as a table and as `graft_report.json`."""

from collections.abc import Sequence
from dataclasses import asdict
from math import prod, sqrt

from torch import Tensor

from vlm.checkpoint import TensorReader
from vlm.graft.donors import layer_of
from vlm.graft.options import BuildOptions
from vlm.graft.plan import (
    EMBEDDING,
    HEAD,
    LAYER_DROPPED,
    MERGER,
    QK_NORM_DROPPED,
    QK_NORMS,
    Step,
)
from vlm.graft.tokenizer import TokenizerChoice

REPORT = "graft_report.json"
ACTIONS = ("copied", "initialised", "resized", "dropped")
VISION_TOKENS = {
    "vision_start": "vision_start_token_id",
    "vision_end": "vision_end_token_id",
    "image_pad": "image_token_id",
}
ROWS_SAMPLED = 1024
"""Rows of the embedding whose mean norm stands for all of them: reading all takes a gigabyte."""


def describe(
    steps: Sequence[Step],
    config: dict,
    choice: TokenizerChoice,
    fresh: dict[str, Tensor],
    identities: dict[str, dict],
    options: BuildOptions,
    llm: TensorReader,
) -> dict:
    """The report as a JSON object: donors, options, tokenizer, every tensor's fate.

    Args:
        fresh: as `fresh_tensors` gives them; their statistics are reported.
        identities: of the donors, by `vision` and `llm`.
        llm: the language donor, for a few rows of its embedding.
    """
    tensors = []
    for step in steps:
        row = {"name": step.name, "module": module_of(step), "action": step.action}
        row |= {"donor": step.donor, "shape": list(step.shape), "dtype": step.dtype}
        row |= {"reason": step.reason}
        if step.fill:
            values = fresh[step.name].float()
            row |= {"fill": step.fill, "added_rows": step.added_rows or None}
            row |= {"mean": values.mean().item(), "std": values.std(correction=0).item()}
        tensors.append(row)
    return {
        "donors": identities,
        "options": asdict(options),
        "tokenizer": {
            "donor": choice.donor,
            "size": choice.size,
            "shared": choice.shared,
            "only_llm": choice.only_llm,
            "only_vision": choice.only_vision,
        },
        "mrope_section": config["text_config"]["rope_parameters"]["mrope_section"],
        "tie_word_embeddings": config["tie_word_embeddings"],
        "vision_rows": vision_rows(config, llm),
        "notes": notes(steps, options),
        "losses": losses(steps),
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


def vision_rows(config: dict, llm: TensorReader) -> dict[str, float]:
    """L2 norms of the embedding's rows around images, and the mean norm of rows in general.

    A token that the donor's embedding has no row for is left out.
    """
    count = llm.shape(EMBEDDING)[0]
    step = max(1, count // ROWS_SAMPLED)
    norms = [_row_norm(llm, row) for row in range(0, count, step)]
    found = {"mean": sum(norms) / len(norms), "rows_sampled": len(norms)}
    for name, key in VISION_TOKENS.items():
        if config[key] < count:
            found[name] = _row_norm(llm, config[key])
    return found


def _row_norm(llm: TensorReader, row: int) -> float:
    return llm.rows(EMBEDDING, row, row + 1).float().norm().item()


def notes(steps: Sequence[Step], options: BuildOptions) -> list[str]:
    """What a reader of the report should know about the choices made."""
    said = []
    kept = [step for step in steps if step.action != "dropped"]
    dtypes = {donor: {s.dtype for s in kept if s.donor == donor} for donor in ("vision", "llm")}
    if len(set().union(*dtypes.values())) > 1:
        each = " and ".join(f"{', '.join(sorted(d))} ({name})" for name, d in dtypes.items())
        said.append(
            f"the donors hold different dtypes, {each}; every tensor keeps its own, --dtype makes "
            "them one"
        )
    if options.merger_init == "donor":
        fresh = [step for step in kept if step.name.startswith(MERGER) and step.fill]
        said.append(
            "the vision donor's merger is kept but for its output layer, which is as wide as the "
            "language model and begins anew"
            if fresh
            else "the vision donor's whole merger is kept, as both language models are equally wide"
        )
    said.append(
        "Qwen3 never trained its rows for vision_start, vision_end and image_pad, and stage 1 "
        "freezes them; stage 2 trains the first two (image_pad's is replaced by the image)"
    )
    return said


def losses(steps: Sequence[Step]) -> list[str]:
    """In words, what of the language donor the hybrid does without."""
    dropped = [step for step in steps if step.action == "dropped" and step.donor == "llm"]
    said = []
    norms = [step for step in dropped if step.reason == QK_NORM_DROPPED]
    if norms:
        said.append(
            f"QK-norm of {len(norms) // len(QK_NORMS)} layers: Qwen3 was trained with queries and "
            "keys normalised and scaled per dimension, and without it "
            "every attention score is another. What the model knew of text is lost until training "
            "brings it back. The zero biases of q, k and v change nothing; stock Qwen2.5-VL "
            "classes insist on them"
        )
    cut = {layer_of(step.name) for step in dropped if step.reason == LAYER_DROPPED}
    if cut:
        said.append(
            f"the last layers of the language donor, {len(cut)} of them: the final norm and the "
            "head were trained on the output of its last layer and now read that of an earlier one"
        )
    return said


def print_account(report: dict) -> None:
    """The report as a table: modules x actions, tensors and parameters."""
    groups: dict[tuple[str, ...], list[dict]] = {}
    for row in report["tensors"]:
        how = row.get("fill") or row["reason"]
        key = (row["module"], row["action"], row["donor"] or "fresh", how)
        groups.setdefault(key, []).append(row)
    print(f"{'module':14}{'action':13}{'from':9}{'tensors':>8}{'parameters':>17}  ")
    for key in sorted(groups, key=lambda key: ACTIONS.index(key[1])):
        module, action, origin, _ = key
        rows = groups[key]
        parameters = sum(prod(row["shape"]) for row in rows)
        print(f"{module:14}{action:13}{origin:9}{len(rows):8}{parameters:17,}  {_how(rows)}")
    kept = [row for row in report["tensors"] if row["action"] != "dropped"]
    print(f"{'hybrid':36}{len(kept):8}{sum(prod(row['shape']) for row in kept):17,}")
    tokenizer = report["tokenizer"]
    print(
        f"tokenizer: the {tokenizer['donor']} donor's, {tokenizer['shared']} tokens shared, "
        f"{len(tokenizer['only_llm'])} only in the LLM's, "
        f"{len(tokenizer['only_vision'])} only in the vision donor's"
    )
    norms = report["vision_rows"]
    each = ", ".join(f"{name} {norms[name]:.3f}" for name in VISION_TOKENS if name in norms)
    print(f"norms of embedding rows: {each}; of all rows about {norms['mean']:.3f}")
    for note in report["notes"]:
        print(f"note: {note}")
    for loss in report["losses"]:
        print(f"LOST: {loss}")


def _how(rows: list[dict]) -> str:
    """Reason of a group, and the mean and standard deviation of what is fresh in it."""
    first = rows[0]
    if "fill" not in first:
        return first["reason"]
    counts = [prod(row["shape"][1:]) * (row["added_rows"] or row["shape"][0]) for row in rows]
    total = sum(counts)
    mean = sum(n * row["mean"] for n, row in zip(counts, rows, strict=True)) / total
    square = sum(
        n * (row["std"] ** 2 + row["mean"] ** 2) for n, row in zip(counts, rows, strict=True)
    )
    std = sqrt(max(0.0, square / total - mean**2))
    text = f"{first['fill']}, mean {mean:.1e}, std {std:.4f}"
    return f"{first['reason']}: {text}" if first["action"] == "resized" else text

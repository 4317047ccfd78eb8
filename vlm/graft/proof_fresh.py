"""Part of the proof: what neither donor gave, drawn again from the report's options and seed."""

from dataclasses import dataclass
from pathlib import Path
from typing import get_args, get_type_hints

import torch

from vlm.checkpoint import TensorReader
from vlm.graft.fresh import fresh_tensors
from vlm.graft.options import BuildOptions
from vlm.graft.plan import EMBEDDING, HEAD, MERGER, QKV_BIASES, Step, derive_config, plan_tensors
from vlm.graft.proof_tensors import (
    BLOCK,
    Difference,
    DonorTensors,
    bits,
    compare_dtypes,
    compare_tensors,
    dtype_notes,
    width,
)
from vlm.graft.report import REPORT
from vlm.hf_config import ConfigError, read_json
from vlm.tensor_file import DTYPES, NAMES


@dataclass(frozen=True)
class Told:
    """What `graft_report.json` tells of how a hybrid was made."""

    options: BuildOptions
    tokenizer: str
    """`llm` or `vision`: whose it is."""


def read_report(model_dir: Path) -> Told | None:
    """The report beside a hybrid, None where there is none; ConfigError if it makes no sense."""
    path = model_dir / REPORT
    if not path.exists():
        return None
    content = read_json(path)
    try:
        options, tokenizer = BuildOptions(**content["options"]), content["tokenizer"]["donor"]
        for name, hint in get_type_hints(BuildOptions).items():
            _check_option(name, getattr(options, name), hint)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} is no report of a graft ({error!r:.150})") from None
    return Told(options, tokenizer)


def _check_option(name: str, value: object, hint: object) -> None:
    """ValueError unless a value is one of those that an option's type allows."""
    kinds = get_args(hint) or (hint,)
    allowed = {choice for kind in kinds for choice in get_args(kind) or (kind,)}
    if not (type(value) in allowed or (isinstance(value, str) and value in allowed)):
        raise ValueError(f"{name} is {value!r}")


@dataclass(frozen=True)
class Made:
    """What was found of all that is not simply a donor's."""

    differences: list[Difference]
    notes: list[str]


def compare_made(
    told: Told | None, hybrid: TensorReader, vision: TensorReader, llm: TensorReader, rows: int
) -> Made:
    """The merger and the added rows of the embedding against what `build` makes of these donors.

    Args: rows: that the embedding should have.

    Raises:
        ConfigError, CheckpointError: donors that no graft as the report has it can be made of.
    """
    if told is None:
        more = hybrid.shape(EMBEDDING)[0] - llm.shape(EMBEDDING)[0]
        also = f" and {more} new rows of the embedding were" if more > 0 else " was"
        return Made([], [f"no {REPORT}: the merger{also} not checked"])
    raws = (read_json(reader.dir / "config.json") for reader in (vision, llm))
    config = derive_config(*raws, rows, told.options)
    steps = plan_tensors(config, vision, llm, told.options)
    donor, asked = DonorTensors(vision, hybrid), asked_dtype(told.options)
    kept = [s.name for s in steps if s.action == "copied" and s.name.startswith(MERGER)]
    pairs = [(name, name) for name in kept]
    found = compare_tensors(pairs, hybrid, donor) + compare_dtypes(pairs, hybrid, donor, asked)
    found += compare_fresh(hybrid, steps, config, told.options)
    if told.options.dtype or len({hybrid.dtype(name) for name in hybrid.names()}) > 1:
        found += _compare_fresh_dtypes(hybrid, steps)
    note = f"merger and new rows are compared with what seed {told.options.seed} gives"
    if kept:
        note += f", but {len(kept)} tensors of the merger with the vision donor's"
    return Made(found, [note, *dtype_notes(donor, "vision", kept)])


def compare_fresh(
    hybrid: TensorReader, steps: list[Step], config: dict, options: BuildOptions
) -> list[Difference]:
    """Differences of merger and added rows from what the seed gives, bit for bit.

    The zero biases of the literal variant are `nonzero_biases`'.

    Args: steps, config: the plan of the build, and the config that it is for.
    """
    planned = {step.name: step for step in steps if step.action != "dropped"}
    held = set(hybrid.names())
    found = [
        Difference(name, f"is no tensor of the graft that {REPORT} tells of")
        for name in sorted(held - set(planned))
    ]
    for name in sorted({EMBEDDING, HEAD} & held & set(planned)):
        ours, expected = hybrid.shape(name), planned[name].shape
        if ours != expected:
            found.append(Difference(name, f"has shape {list(ours)}, the graft's {list(expected)}"))
    wrong = {difference.name for difference in found}
    for name, values in fresh_tensors(steps, config, options.seed).items():
        if name not in held or name in wrong or name.endswith(QKV_BIASES):
            continue
        stop = hybrid.shape(name)[0]
        ours = hybrid.rows(name, stop - len(values), stop)
        differ = bits(ours) != bits(values.to(DTYPES[hybrid.dtype(name)]))
        count = int(differ.any(dim=1).sum())
        if count:
            what = "values" if values.dim() == 1 else "rows"
            how = (
                f"{count} of {len(values)} fresh {what} are not what seed {options.seed} gives "
                "(training changes them; verify is for a graft as it was built)"
            )
            found.append(Difference(name, how))
    return found


def _compare_fresh_dtypes(hybrid: TensorReader, steps: list[Step]) -> list[Difference]:
    fresh = {step.name: step.dtype for step in steps if step.action == "initialised"}
    return [
        Difference(name, f"is {hybrid.dtype(name)}, and build made it {fresh[name]}")
        for name in hybrid.names()
        if fresh.get(name, hybrid.dtype(name)) != hybrid.dtype(name)
    ]


def asked_dtype(options: BuildOptions | None) -> str | None:
    """`--dtype` as safetensors name it; None where each tensor keeps its donor's."""
    asked = options and options.dtype
    return NAMES[getattr(torch, asked)] if asked else None


def not_finite(hybrid: TensorReader) -> list[Difference]:
    """Tensors that hold infinities or nan, whosever they are."""
    found = []
    for name in hybrid.names():
        rows, count, first = hybrid.shape(name)[0], 0, -1
        step = max(1, BLOCK // width(hybrid.shape(name)))
        for start in range(0, rows, step):
            values = hybrid.rows(name, start, min(start + step, rows))
            if not values.isfinite().all():
                bad = ~values.reshape(len(values), -1).isfinite()
                first = first if count else start + int(bad.any(dim=1).nonzero()[0])
                count += int(bad.sum())
        if count:
            what = "value" if len(hybrid.shape(name)) == 1 else "row"
            how = f"holds infinities or nan, {count} in all, the first in {what} {first}"
            found.append(Difference(name, how))
    return found

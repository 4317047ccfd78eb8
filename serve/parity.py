"""The same requests through our model, transformers and vLLM: do all three answer alike?

    python serve/parity.py exports/my-vlm                          # the built-in requests
    python serve/parity.py exports/my-vlm --data data/train.jsonl  # the first rows of your data

Of each request it compares token ids, image and video grids, pixels and M-RoPE positions, which
must be identical (pixels to 1e-6), the log-probabilities of the first token, and the greedy
answer. One row of the table per request and engine; exit code 1 where anything differs.

A literal graft runs in transformers' own classes, which place what follows a video otherwise than
vLLM and training. Of such a request ids, grids and pixels must be the same, and no more is judged.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from serve.limits import read_limits
from serve.parity_requests import built_in_requests, requests_from
from serve.serve_config import ServeConfig
from serve.views import View, our_views, transformers_views
from vlm.checkpoint import CheckpointError
from vlm.data.processor import Processor
from vlm.data.schema import BadSample, Sample
from vlm.hf_config import ConfigError, read_json
from vlm.hub import add_hub_argument, resolve_model

ENGINES = ("transformers", "vllm")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PIXEL_TOLERANCE = 1e-6
"""Normalising in another order of operations; one level of 255 is above 1e-2."""
STOCK_POSITIONS = "ids, grids, pixels same; stock transformers places text after a video otherwise"
LOGPROB_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.25}
"""In bfloat16 kernels that sum in another order differ by percents."""


@dataclass(frozen=True)
class Row:
    """One request through one engine, against ours."""

    request: str
    engine: str
    ids: bool
    grids: bool
    pixels: float
    """Largest difference of normalised values; infinite where shapes differ."""
    positions: bool
    logprobs: float
    """Largest difference over the first token's most likely candidates."""
    same_tokens: int
    """Length of the common start of the greedy answers."""
    tokens: int
    passed: bool
    note: str = ""
    """Why it was not asked, or not judged in full."""


def compare(name: str, engine: str, ours: View, theirs: View, dtype: torch.dtype) -> Row:
    """One row; in bfloat16 the greedy answers are shown and not judged."""
    shapes = [p.shape for p in ours.pixels] == [p.shape for p in theirs.pixels]
    pairs = zip(ours.pixels, theirs.pixels, strict=True) if shapes else ()
    pixels = max((float((a - b).abs().max()) for a, b in pairs), default=0.0)
    pixels = pixels if shapes else float("inf")
    positions = torch.equal(ours.positions.cpu(), theirs.positions.cpu())
    shared = ours.logprobs.keys() & theirs.logprobs.keys()
    deltas = [abs(ours.logprobs[token] - theirs.logprobs[token]) for token in shared]
    logprobs = max(deltas, default=float("inf"))
    same = 0
    for a, b in zip(ours.tokens, theirs.tokens, strict=False):
        if a != b:
            break
        same += 1
    ids, grids = ours.ids == theirs.ids, ours.grids == theirs.grids
    passed = ids and grids and positions and pixels <= PIXEL_TOLERANCE
    passed = passed and logprobs <= LOGPROB_TOLERANCE[dtype]
    passed = passed and (dtype != torch.float32 or same == len(ours.tokens))
    return Row(
        request=name,
        engine=engine,
        ids=ids,
        grids=grids,
        pixels=pixels,
        positions=positions,
        logprobs=logprobs,
        same_tokens=same,
        tokens=len(ours.tokens),
        passed=passed,
    )


def run(
    folder: Path,
    samples: Sequence[Sample],
    engines: Sequence[str],
    dtype: torch.dtype,
    new: int,
    **vllm_options,
) -> list[Row]:
    """A row per request and engine; each engine has the memory for itself."""
    limits = read_limits(folder)
    processor = Processor.from_pretrained(folder, limits)
    ours = our_views(folder, samples, processor, dtype, new)
    rows = []
    for engine in engines:
        asked = samples
        if engine == "transformers":
            theirs = transformers_views(folder, samples, processor, dtype, new)
        else:
            from serve.vllm_view import VLLM

            refused = {
                s.id: why
                for s, o in zip(samples, ours, strict=True)
                if (why := too_much(s, o, new))
            }
            asked = [sample for sample in samples if sample.id not in refused]
            vllm = VLLM(folder, limits, dtype, **vllm_options)
            theirs = vllm.views(asked, new)
            vllm.close()
            rows += [not_asked(name, why) for name, why in refused.items()]
        pairs = [pair for pair in zip(samples, ours, strict=True) if pair[0] in asked]
        stock = engine == "transformers" and "auto_map" not in read_json(folder / "config.json")
        for (sample, our), their in zip(pairs, theirs, strict=True):
            row = compare(sample.id, engine, our, their, dtype)
            rows.append(forgive_positions(row) if stock and sample.videos else row)
    return rows


def forgive_positions(row: Row) -> Row:
    """A request with a video through stock transformers, whose positions are its own."""
    if row.positions:
        return row
    same = row.ids and row.grids and row.pixels <= PIXEL_TOLERANCE
    return replace(row, passed=same, note=STOCK_POSITIONS if same else "")


def too_much(sample: Sample, ours: View, new: int) -> str:
    """Why a server with the launcher's limits would refuse a request; empty if it would not."""
    if len(sample.images) > ServeConfig.max_images:
        return f"{len(sample.images)} images, a server takes {ServeConfig.max_images}"
    if len(sample.videos) > ServeConfig.max_videos:
        return f"{len(sample.videos)} videos, a server takes {ServeConfig.max_videos}"
    if len(ours.ids) + new > ServeConfig.max_model_len:
        return f"{len(ours.ids)} + {new} tokens, a server takes {ServeConfig.max_model_len}"
    return ""


def not_asked(name: str, why: str) -> Row:
    return Row(
        name, "vllm", True, True, 0.0, True, 0.0, 0, 0, passed=True, note=f"not asked: {why}"
    )


def table(rows: list[Row]) -> str:
    """The rows, for a terminal."""
    width = max(len(row.request) for row in rows)
    lines = [
        f"{'request':{width}}  {'engine':12}  ids  grids  {'pixels':>8}  positions  "
        f"{'|dlogprob|':>10}  greedy tokens"
    ]
    word = {True: "same", False: "DIFF"}
    for row in rows:
        if row.note:
            lines.append(f"{row.request:{width}}  {row.engine:12}  {row.note}")
            continue
        lines.append(
            f"{row.request:{width}}  {row.engine:12}  {word[row.ids]} {word[row.grids]:5}  "
            f"{row.pixels:8.1e}  {word[row.positions]:9}  {row.logprobs:10.1e}  "
            f"{row.same_tokens}/{row.tokens}{'' if row.passed else '   <-- differs'}"
        )
    return "\n".join(lines)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python serve/parity.py", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", help="directory of an export, or its hub id")
    add_hub_argument(parser)
    parser.add_argument("--data", type=Path, help="JSONL of your own instead of the built-in ones")
    parser.add_argument("--rows", type=int, default=20, help="how many rows of --data")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of all three")
    parser.add_argument("--max_new_tokens", type=int, default=16, help="greedy tokens compared")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        if options.max_new_tokens < 1 or options.rows < 1:
            raise ConfigError("--max_new_tokens and --rows must be 1 or more")
        if options.json and not options.json.parent.is_dir():
            raise ConfigError(f"--json {options.json}: its folder does not exist")
        data = options.data
        samples = requests_from(data, options.rows) if data else built_in_requests()
        dtype, new = DTYPES[options.dtype], options.max_new_tokens
        model = resolve_model(options.model, options.hub)
        rows = run(model, samples, options.engines, dtype, new)
    except (ConfigError, CheckpointError, BadSample) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(rows))
    if options.json:
        content = [asdict(row) for row in rows]
        options.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    failed = [row for row in rows if not row.passed]
    if failed:
        print(f"{len(failed)} of {len(rows)} comparisons differ")
        return 1
    asked = sum(not row.note for row in rows)
    print(f"all {asked} comparisons agree")
    return 0


if __name__ == "__main__":
    sys.exit(main())

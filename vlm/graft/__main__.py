"""Build a hybrid from two donors, or prove one.

python -m vlm.graft build  --vision DIR --llm DIR --out DIR [--seed N]
python -m vlm.graft verify --model DIR --llm DIR [--json FILE]

Exit code 0: done, or proved. 1: the proof failed. 2: bad input, in one sentence.
"""

import argparse
import sys
from pathlib import Path

from vlm.checkpoint import CheckpointError, write_json
from vlm.graft.report import print_account
from vlm.graft.stream import build
from vlm.graft.verify import WITNESS_TOLERANCE, Proof, verify
from vlm.hf_config import ConfigError


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m vlm.graft", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("build", help="join two donors")
    make.add_argument("--vision", type=Path, required=True, help="Qwen2.5-VL's directory")
    make.add_argument("--llm", type=Path, required=True, help="Qwen3's directory")
    make.add_argument("--out", type=Path, required=True, help="directory to create")
    make.add_argument("--seed", type=int, default=0, help="seed of the fresh merger")
    prove = commands.add_parser("verify", help="on text the hybrid equals its language donor")
    prove.add_argument("--model", type=Path, required=True, help="the hybrid's directory")
    prove.add_argument("--llm", type=Path, required=True, help="the language donor's directory")
    prove.add_argument("--json", type=Path, help="also write the figures to this file")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        if options.command == "build":
            print_account(build(options.vision, options.llm, options.out, options.seed))
            print(f"wrote {options.out}")
            return 0
        proof = verify(options.model, options.llm)
    except (ConfigError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_proof(proof)
    if options.json:
        write_json(options.json, proof.as_json())
    return 0 if proof.holds else 1


def print_proof(proof: Proof) -> None:
    if proof.differing_tensors:
        few = ", ".join(proof.differing_tensors[:5])
        print(f"{len(proof.differing_tensors)} text tensors differ from the donor's: {few}")
    print(f"text tokens compared              {proof.tokens}")
    print(f"max |delta logit|, plain rope     {proof.max_abs_delta:g} (must be 0)")
    print(
        f"the same against transformers     {proof.witness_max_abs_delta:.2e} of the largest "
        f"|logit| (at most {WITNESS_TOLERANCE:g})"
    )
    print(f"top-1 agreement                   {proof.top1_agreement:.2%}")
    verdict = "equals the language donor" if proof.holds else "does NOT equal the language donor"
    print(f"on text the hybrid {verdict}")


if __name__ == "__main__":
    sys.exit(main())

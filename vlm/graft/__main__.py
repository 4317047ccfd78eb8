"""Build a hybrid from two donors, or prove one.

python -m vlm.graft build  --vision DIR|ID --llm DIR|ID --out DIR [--variant exact|literal] ...
python -m vlm.graft verify --model DIR|ID --llm DIR|ID [--vision DIR|ID] ...

Exit code 0: done, or proved. 1: the proof failed. 2: bad input, in one sentence. 130: stopped by
Ctrl-C. 141: nobody read the output to its end.
"""

import argparse
import os
import re
import sys
from pathlib import Path
from typing import get_args, get_type_hints

from vlm.checkpoint import CheckpointError
from vlm.graft import verify
from vlm.graft.options import BuildOptions
from vlm.graft.report import print_account
from vlm.graft.stream import build
from vlm.hf_config import ConfigError
from vlm.hub import add_hub_argument, resolve_model
from vlm.partial import check_new

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
DEFAULTS = BuildOptions()


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m vlm.graft", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="command", required=True)
    add_build_arguments(commands.add_parser("build", help="join two donors"))
    verify.add_arguments(commands.add_parser("verify", help="prove that a hybrid is its donors"))
    return parser.parse_args(arguments)


def add_build_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--vision", required=True, help="a Qwen2.5-VL: directory or hub id")
    parser.add_argument("--llm", required=True, help="a dense Qwen3: directory or hub id")
    add_hub_argument(parser)
    parser.add_argument("--out", type=Path, required=True, help="directory to create")
    parser.add_argument("--seed", type=int, default=DEFAULTS.seed, help="of all that is fresh")
    parser.add_argument(
        "--variant",
        choices=choices("variant"),
        default=DEFAULTS.variant,
        help="literal: the stock qwen2_5_vl layout, which drops QK-norm (docs/graft.md)",
    )
    parser.add_argument(
        "--merger_init",
        choices=choices("merger_init"),
        default=DEFAULTS.merger_init,
        help="donor: keep of the vision donor's merger what fits",
    )
    parser.add_argument("--llm_layers", type=int, metavar="N", help="keep the first N layers only")
    parser.add_argument(
        "--dtype", choices=choices("dtype"), help="of all weights; default: as the donors have them"
    )
    parser.add_argument(
        "--max_shard_size", default="4GB", metavar="SIZE", help="of a weight file, such as 500MB"
    )


def choices(name: str) -> tuple[str, ...]:
    """The values that an option of BuildOptions may have."""
    hint = get_type_hints(BuildOptions)[name]
    parts = get_args(hint)
    return parts if isinstance(parts[0], str) else get_args(parts[0])


def parse_size(text: str) -> int:
    """`4GB`, `500MB`: bytes, by powers of ten as the hub has it.

    Raises:
        ConfigError: no such size.
    """
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)\s*(KB|MB|GB|TB)", text.strip().upper())
    size = int(float(found[1]) * UNITS[found[2]]) if found else 0
    if size < 1:
        raise ConfigError(f"--max_shard_size {text!r} is no size; give one such as 4GB or 500MB")
    return size


def run_build(options: argparse.Namespace) -> int:
    chosen = BuildOptions(
        seed=options.seed,
        variant=options.variant,
        merger_init=options.merger_init,
        llm_layers=options.llm_layers,
        dtype=options.dtype,
        max_shard_size=parse_size(options.max_shard_size),
    )
    check_new(options.out)  # before anything is downloaded
    donors = (resolve_model(name, options.hub) for name in (options.vision, options.llm))
    print_account(build(*donors, options.out, chosen))
    print(f"wrote {options.out}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        code = run_build(options) if options.command == "build" else verify.run(options)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("stopped; run it again, a build goes on from what it has written", file=sys.stderr)
        return 130
    except BrokenPipeError:  # such as `| head`; nor is the flush at exit to fail
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ConfigError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

"""The plan carried out: from the donors' files to the hybrid's, never a model in memory."""

import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from vlm.checkpoint import TensorReader, write_json
from vlm.graft.donors import check_donor_tensors, read_donor_configs
from vlm.graft.fresh import fresh_tensors
from vlm.graft.identity import Identities, fingerprint
from vlm.graft.options import BuildOptions
from vlm.graft.plan import Step, derive_config, plan_tensors, written_dtype
from vlm.graft.report import REPORT, describe
from vlm.graft.tokenizer import choose_tokenizer, load_tokenizer, write_companions
from vlm.hf_config import ConfigError, parse_config, parse_text_config
from vlm.model_files import check_settings, check_tokenizer
from vlm.partial import check_new, partial_of
from vlm.shards import Entry, plan_shards, write_checkpoint


def build(
    vision_dir: Path | str,
    llm_dir: Path | str,
    out_dir: Path | str,
    options: BuildOptions = BuildOptions(),  # noqa: B008 - frozen
) -> dict:
    """Graft the vision donor's tower onto the language donor; returns the report.

    Everything is checked before the first byte is written, and `out_dir` appears whole or not at
    all. Killed, it leaves `out_dir`.partial, which the same build takes up again; equal donors
    and options give equal bytes either way.

    Raises:
        ConfigError, CheckpointError: one sentence about what does not fit.
    """
    vision_dir, llm_dir, out_dir = Path(vision_dir), Path(llm_dir), Path(out_dir)
    check_new(out_dir)
    vision_raw, llm_raw = read_donor_configs(vision_dir, llm_dir)
    readers = {"vision": TensorReader(vision_dir), "llm": TensorReader(llm_dir)}
    check_donor_tensors(vision_raw, readers["vision"], llm_raw, readers["llm"])
    choice = choose_tokenizer(vision_dir, llm_dir)
    rows = max(parse_text_config(llm_raw).vocab_size, choice.size)
    config = derive_config(vision_raw, llm_raw, rows, options)
    hybrid, tokenizer = parse_config(config), load_tokenizer(choice.folder)
    check_tokenizer(choice.folder / "tokenizer.json", tokenizer, hybrid)
    check_settings(vision_dir, hybrid)
    steps = plan_tensors(config, readers["vision"], readers["llm"], options)
    config["dtype"] = written_dtype(steps)
    fresh = fresh_tensors(steps, config, options.seed)
    shards = plan_shards(make_entries(steps, fresh, readers), options.max_shard_size)
    report: dict = {}
    try:
        with tempfile.TemporaryDirectory() as companions, Identities(readers, shards) as identities:
            write_companions(Path(companions), choice, vision_dir)

            def finish(folder: Path) -> None:
                found = identities.result()
                report.update(
                    describe(steps, config, choice, fresh, found, options, readers["llm"])
                )
                write_json(folder / REPORT, report)
                for file in Path(companions).iterdir():
                    shutil.copyfile(file, folder / file.name)
                write_json(folder / "config.json", config)

            zeroed = write_checkpoint(out_dir, shards, finish, fingerprint(shards), label="graft")
    except OSError as error:
        partial = partial_of(out_dir)
        again = f"; the same command goes on from what {partial} holds" if partial.is_dir() else ""
        raise ConfigError(f"{error.filename or out_dir}: {error.strerror}{again}") from None
    if zeroed:
        print(f"note: {zeroed:,} values too small for {options.dtype} became 0", file=sys.stderr)
    return report


def make_entries(
    steps: Sequence[Step], fresh: dict[str, Tensor], readers: dict[str, TensorReader]
) -> list[Entry]:
    """What is written, in the plan's order; a resized tensor is the donor's rows, then ours."""
    entries = []
    for step in steps:
        if step.action != "dropped":
            held = [readers[step.donor].stored(step.name)] if step.donor else []
            made = [fresh[step.name]] if step.name in fresh else []
            entries.append(Entry(step.name, step.dtype, step.shape, (*held, *made)))
    return entries

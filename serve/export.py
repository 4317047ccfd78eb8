"""A training checkpoint -> a directory that transformers and vLLM load.

    python serve/export.py runs/stage2 --out exports/my-vlm
    python serve/export.py runs/stage2/checkpoint-3000 --out exports/my-vlm --format vllm_stock
    python serve/export.py models/graft-8b --out exports/graft --push my-name/my-vlm

The source is a run, a checkpoint of it, or any model directory of ours. The export takes its
limits on images and videos from the run's config, so that the model is served what it was
trained on. A literal graft (`vlm.graft build --variant literal`) is written as the plain
qwen2_5_vl that it is. Before it gets its final name it is loaded again by the code that it
carries, or by stock code, and its logits are compared with ours.
"""

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from serve.export_files import LITERAL, STOCK_WARNING, Format, export_config, files_beside
from serve.model_card import model_card
from serve.reload import check_reload
from serve.source import find_model, limits_of, training_stages
from vlm.checkpoint import CheckpointError, TensorReader, save_model
from vlm.config import VLMConfig
from vlm.data.limits import Limits
from vlm.graft.report import REPORT
from vlm.graft.tokenizer import TOKENIZER_FILES
from vlm.hf_config import ConfigError, read_config, read_json
from vlm.hub import Hub, add_hub_argument
from vlm.partial import check_new
from vlm.shards import Entry

FORMATS = ("hf", "vllm_stock")
LARGEST_SHARD_GB = 1_000_000
DTYPES = {"bfloat16": "BF16", "float32": "F32"}


@dataclass(frozen=True)
class ExportOptions:
    """What to export, where to, and how."""

    source: str | Path
    """A directory, or a hub id."""
    out: Path
    hub: Hub = "huggingface"
    format: Format = "hf"
    dtype: str | None = None
    """Of the weights; None keeps each tensor's own."""
    max_shard_gb: float = 4.0
    limits: dict | None = None
    """Those of `Limits` that differ from the run's, or from the recipe's where there is no run."""
    results: Path | None = None
    """Results of eval/run.py for the card."""
    push: str | None = None
    """Repository on the hub, `owner/name`."""
    private: bool = False


def export(options: ExportOptions) -> Path:
    """Write, check and rename; returns the export's directory.

    Raises:
        ConfigError, CheckpointError: one sentence about what does not fit; nothing is left at
            the export's final name.
    """
    check_new(options.out)
    source = find_model(options.source, options.hub)
    raw, config = read_json(source / "config.json"), read_config(source)
    format = written_format(source, raw, config, options.format)
    stages = training_stages(source)
    try:
        limits = Limits(**limits_of(source) | (options.limits or {}))
    except ValueError as error:
        raise ConfigError(str(error)) from None
    written_config = export_config(raw, config, format)
    if options.dtype:
        written_config["dtype"] = options.dtype
    name = options.push or options.out.name
    card = model_card(name, source, config, limits, format, stages, options.results)
    files = files_beside(source, limits, config, format, card)
    unchecked = options.out.with_name(options.out.name + ".unchecked")
    tensors = export_tensors(source, format, options.dtype, written_config)
    try:
        with tempfile.TemporaryDirectory() as folder:
            for table in (*TOKENIZER_FILES, REPORT):
                if (source / table).exists():
                    shutil.copyfile(source / table, Path(folder) / table)
            save_model(unchecked, tensors, folder, written_config, int(options.max_shard_gb * 1e9))
        for file, text in files.items():
            (unchecked / file).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{options.out} cannot be written: {error.strerror}") from None
    check_reload(source, unchecked, limits, format)
    os.replace(unchecked, options.out)
    return options.out


def written_format(source: Path, raw: dict, config: VLMConfig, asked: Format) -> Format:
    """The format asked for, or `stock` for a literal graft, which needs no code anywhere.

    Raises:
        ConfigError: a model that is no graft, or a literal one in another format.
    """
    if raw["model_type"] == "graft_vl":
        return asked
    grafted = any((source / name).exists() for name in (REPORT, LITERAL))
    if config.text.qk_norm or not grafted:
        raise ConfigError(f"{source} is a {raw['model_type']} model; a graft is exported")
    if asked != "hf":
        raise ConfigError(
            f"{source} is a literal graft, which stock transformers and vLLM both load; leave "
            f"--format {asked} out"
        )
    return "stock"


def export_tensors(
    source: Path, format: Format, dtype: str | None, config: dict
) -> Iterator[Entry]:
    """What is written; stock classes get the zero biases that they insist on."""
    reader = TensorReader(source)
    if config["tie_word_embeddings"]:
        reader.discard("lm_head.weight")
    for name in reader.names():
        entry = reader.entry(name, DTYPES[dtype] if dtype else None)
        yield replace(entry, name=hub_name(name)) if format == "stock" else entry
        stem, _, leaf = name.rpartition(".")
        is_qkv = stem.endswith(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))
        if format == "vllm_stock" and is_qkv and leaf == "weight":
            rows = entry.shape[0]
            yield Entry(f"{stem}.bias", entry.dtype, (rows,), (torch.zeros(rows),))


def hub_name(name: str) -> str:
    """Our tensor names -> those of the hub's Qwen2.5-VL."""
    return name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")


def push(folder: Path, repository: str, private: bool) -> str:
    """Upload an export to the hub; returns its address. Needs `hf auth login` or HF_TOKEN.

    Raises:
        ConfigError: the hub refused, or cannot be reached; the export stays where it is.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        api = HfApi()
        url = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="GraftVL export")
    except (HfHubHTTPError, OSError, ValueError) as error:  # connection errors are OSErrors
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"{repository} could not be uploaded ({reason}); the export is in {folder}, and "
            f"`hf upload {repository} {folder}` tries again"
        ) from None
    return str(url)


def parse_arguments(arguments: list[str] | None = None) -> ExportOptions:
    parser = argparse.ArgumentParser(prog="python serve/export.py", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("source", help="a run, a checkpoint, a model directory or a hub id")
    add_hub_argument(parser)
    parser.add_argument("--out", type=Path, required=True, help="must not exist yet")
    parser.add_argument(
        "--format", choices=FORMATS, default="hf", help="vllm_stock: for vLLM, no plugin"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="default: as the checkpoint has it")
    parser.add_argument("--max_shard_gb", type=float, default=4.0)
    for field in fields(Limits):
        parser.add_argument(f"--{field.name}", type=field.type, help="default: the run's")
    parser.add_argument("--results", type=Path, help="results of eval/run.py, for the model card")
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload to this hub repository")
    parser.add_argument("--private", action="store_true", help="a repository made by --push")
    given = vars(parser.parse_args(arguments))
    if not 0 < given["max_shard_gb"] <= LARGEST_SHARD_GB:  # not so for NaN either
        parser.error(f"--max_shard_gb must be above 0 and up to {LARGEST_SHARD_GB:,}")
    names = [field.name for field in fields(Limits)]
    limits = {name: given.pop(name) for name in names}
    given["limits"] = {name: value for name, value in limits.items() if value is not None}
    return ExportOptions(**given)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        folder = export(options)
        if options.format == "vllm_stock":
            print(f"WARNING: {STOCK_WARNING}", file=sys.stderr)
        print(f"exported to {folder}")
        if options.push:
            print(f"uploaded to {push(folder, options.push, options.private)}")
    except (ConfigError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

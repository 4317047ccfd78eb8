"""Models on disk: the hub's layout, safetensors only, strict about every key.

A checkpoint is a directory with `config.json`, one or several `*.safetensors` files (with
`model.safetensors.index.json` where there are several) and the companion files of tokenizer
and processor. Donors and other tools write the keys `visual.*`, `model.layers.*`; ours are
`model.visual.*`, `model.language_model.*`. Both are read, ours are written.
"""

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vlm.hf_config import read_config, read_json, read_text_config
from vlm.model import LanguageModel, VisionLanguageModel

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
COMPANION_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
    "graft_report.json",
)
"""Files that travel with the weights from one checkpoint to the next."""


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged or does not fit its config."""


def canonical_name(key: str) -> str:
    """The hub's tensor names -> ours; ours stay as they are."""
    if key.startswith("visual."):
        return f"model.{key}"
    if key.startswith(("model.layers.", "model.embed_tokens.", "model.norm.")):
        return key.replace("model.", "model.language_model.", 1)
    return key


class TensorReader:
    """The tensors of a checkpoint by our names, read one by one, on demand.

    Raises CheckpointError: no weights, a missing or damaged file, an index that names tensors
    which its files do not hold, or two keys that mean the same tensor.
    """

    def __init__(self, model_dir: Path | str) -> None:
        self.dir = Path(model_dir)
        self._handles = {}
        self._where: dict[str, tuple[str, str]] = {}
        index = self.dir / INDEX
        if index.exists():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise CheckpointError(f"{index} has no weight_map")
            for file in sorted(set(weight_map.values())):
                held = set(self._open(file).keys())
                named = {key for key, f in weight_map.items() if f == file}
                for key in sorted(named - held):
                    raise CheckpointError(f"{index} says that {file} holds {key}; it does not")
                self._add(file, held)
        elif (self.dir / SINGLE).exists():
            self._add(SINGLE, self._open(SINGLE).keys())
        else:
            raise CheckpointError(f"{self.dir} has neither {SINGLE} nor {INDEX}")

    def _open(self, file: str):
        path = self.dir / file
        try:
            self._handles[file] = safe_open(path, framework="pt")
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing; download the checkpoint again") from None
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} is damaged ({error}); download it again") from None
        return self._handles[file]

    def _add(self, file: str, keys: Iterable[str]) -> None:
        for key in keys:
            name = canonical_name(key)
            if name in self._where:
                raise CheckpointError(f"{self.dir} holds {name} twice")
            self._where[name] = (file, key)

    def discard(self, name: str) -> None:
        """Leave a tensor out, if it is there."""
        self._where.pop(name, None)

    def names(self) -> list[str]:
        return sorted(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        file, key = self._where[name]
        return tuple(self._handles[file].get_slice(key).get_shape())

    def get(self, name: str) -> Tensor:
        file, key = self._where[name]
        return self._handles[file].get_tensor(key)


def check_names(expected: dict[str, tuple[int, ...]], reader: TensorReader) -> None:
    """Raise CheckpointError unless a checkpoint holds exactly the expected names and shapes."""
    held = set(reader.names())
    for what, names in (("lacks", set(expected) - held), ("also holds", held - set(expected))):
        if names:
            few = ", ".join(sorted(names)[:3]) + (" ..." if len(names) > 3 else "")
            raise CheckpointError(f"{reader.dir} {what} {len(names)} tensors: {few}")
    for name, shape in expected.items():
        if reader.shape(name) != shape:
            raise CheckpointError(
                f"{reader.dir}: {name} has shape {list(reader.shape(name))}, "
                f"its config.json asks for {list(shape)}"
            )


def load_model(
    model_dir: Path | str,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> VisionLanguageModel:
    """A checkpoint as our model: built on the meta device, then given its tensors.

    Raises:
        ConfigError, CheckpointError: one sentence about what is missing or does not fit.
    """
    config = read_config(model_dir)
    return _load(
        VisionLanguageModel, config, config.text.tie_word_embeddings, model_dir, dtype, device
    )


def load_language_model(
    model_dir: Path | str,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> LanguageModel:
    """A language donor's checkpoint; raises as `load_model` does."""
    config = read_text_config(model_dir)
    return _load(LanguageModel, config, config.tie_word_embeddings, model_dir, dtype, device)


def _load(kind, config, tied: bool, model_dir, dtype, device):
    reader = TensorReader(model_dir)
    if tied:  # some tools write the tied head out
        reader.discard("lm_head.weight")
    with torch.device("meta"):
        model = kind(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    check_names(expected, reader)
    state = {name: reader.get(name).to(device, dtype) for name in expected}
    model.load_state_dict(state, assign=True)
    return model


def save_model(
    out_dir: Path | str,
    tensors: Iterable[tuple[str, Tensor]],
    companions: Path | str,
    config: dict | None = None,
    max_shard_bytes: int = 4_000_000_000,
) -> None:
    """Write a checkpoint beside its final name, then rename it: it is whole or absent.

    Args:
        tensors: (name, tensor) in writing order; consumed one by one, one shard in memory.
        companions: the directory whose companion files (and, without `config`, whose
            `config.json`) go with the weights.
        config: the JSON object to write as `config.json`.
    """
    out_dir, companions = Path(out_dir), Path(companions)
    partial = out_dir.with_name(out_dir.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _write_shards(partial, tensors, max_shard_bytes)
    for file in COMPANION_FILES:
        if (companions / file).exists():
            shutil.copyfile(companions / file, partial / file)
    if config is None:
        shutil.copyfile(companions / "config.json", partial / "config.json")
    else:
        write_json(partial / "config.json", config)
    old = out_dir.with_name(out_dir.name + ".old")
    if out_dir.exists():
        os.replace(out_dir, old)
    os.replace(partial, out_dir)
    shutil.rmtree(old, ignore_errors=True)


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]], limit: int) -> None:
    shards: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        save_file(shard, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        nbytes = tensor.numel() * tensor.element_size()
        if shard and size + nbytes > limit:
            flush()
            size = 0
        shard[name] = tensor.detach().contiguous().cpu()
        size += nbytes
        total += nbytes
    flush()
    if len(shards) == 1:
        os.replace(folder / "shard-0", folder / SINGLE)
        return
    weight_map = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        os.replace(folder / f"shard-{number}", folder / file)
        weight_map |= dict.fromkeys(names, file)
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})

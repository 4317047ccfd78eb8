"""Models on disk: the hub's layout, safetensors only, strict about every key.

A checkpoint is a directory with `config.json`, one or several `*.safetensors` files (with
`model.safetensors.index.json` where there are several) and the companion files of tokenizer
and processor. Donors and other tools write the keys `visual.*`, `model.layers.*`; ours are
`model.visual.*`, `model.language_model.*`. Both are read, ours are written.
"""

import json
import shutil
from collections.abc import Iterable
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from vlm.hf_config import read_config, read_text_config
from vlm.model import LanguageModel, VisionLanguageModel
from vlm.shards import INDEX, SHARD_BYTES, SINGLE, Entry, plan_shards, write_checkpoint
from vlm.tensor_file import CheckpointError, Stored, each_once, read_header

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


FLOATS = ("BF16", "F16", "F32")
"""What the weights of a model may be; others belong to quantised ones."""


def canonical_name(key: str) -> str:
    """The hub's tensor names -> ours; ours stay as they are."""
    if key.startswith("visual."):
        return f"model.{key}"
    if key.startswith(("model.layers.", "model.embed_tokens.", "model.norm.")):
        return key.replace("model.", "model.language_model.", 1)
    return key


class TensorReader:
    """The tensors of a checkpoint by our names, read one by one, on demand.

    All headers are read at once, and so a damaged download is found before any work.

    Raises:
        CheckpointError: no weights, a missing, truncated or damaged file, an index that names
            tensors which its files do not hold or files outside the folder, or two keys that mean
            the same tensor.
    """

    def __init__(self, model_dir: Path | str) -> None:
        self.dir = Path(model_dir)
        self._where: dict[str, Stored] = {}
        if (self.dir / INDEX).exists():
            weight_map = read_index(self.dir / INDEX)
            for file in sorted(set(weight_map.values())):
                held = read_header(self.dir / file)
                for key in (key for key, f in weight_map.items() if f == file):
                    if key not in held:
                        raise CheckpointError(
                            f"{self.dir / INDEX} says that {file} holds {key}; it does not"
                        )
                self._add(held)
        elif (self.dir / SINGLE).exists():
            self._add(read_header(self.dir / SINGLE))
        else:
            raise CheckpointError(f"{self.dir} has neither {SINGLE} nor {INDEX}")

    def _add(self, held: dict[str, Stored]) -> None:
        for key, stored in held.items():
            name = canonical_name(key)
            if name in self._where:
                raise CheckpointError(
                    f"{self.dir} holds {name} twice ({self._where[name].path.name} and "
                    f"{stored.path.name})"
                )
            self._where[name] = stored

    def discard(self, name: str) -> None:
        """Leave a tensor out, if it is there."""
        self._where.pop(name, None)

    def names(self) -> list[str]:
        return sorted(self._where)

    def files(self) -> list[Path]:
        """The weight files that hold them."""
        return sorted({stored.path for stored in self._where.values()})

    def shape(self, name: str) -> tuple[int, ...]:
        return self._where[name].shape

    def dtype(self, name: str) -> str:
        """As safetensors name it, such as `BF16`."""
        return self._where[name].dtype

    def stored(self, name: str) -> Stored:
        """Which bytes of which file a tensor is."""
        return self._where[name]

    def get(self, name: str) -> Tensor:
        """A tensor's values, in memory of their own."""
        stored = self._where[name]
        return stored.values().reshape(stored.shape)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start to stop of a tensor of two or more dimensions, the others unread."""
        stored = self._where[name]
        width = prod(stored.shape[1:])
        return stored.values(start * width, stop * width).reshape(stop - start, *stored.shape[1:])

    def entry(self, name: str, dtype: str | None = None) -> Entry:
        """A tensor to be copied, or converted, by the chunk."""
        stored = self._where[name]
        return Entry(name, dtype or stored.dtype, stored.shape, (stored,))


def read_index(path: Path) -> dict[str, str]:
    """The weight map of an index: tensor -> file beside it; CheckpointError where it is wrong."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=each_once)
        weight_map = content["weight_map"]
        outside = [file for file in weight_map.values() if Path(file).name != file]
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} has no sensible weight_map: {error!r:.150}") from None
    if outside:
        raise CheckpointError(f"{path} names {outside[0]}, which is no file beside it")
    return weight_map


def check_names(expected: dict[str, tuple[int, ...]], reader: TensorReader) -> None:
    """Raise CheckpointError unless a checkpoint holds just these names and shapes, as floats."""
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
        if reader.dtype(name) not in FLOATS:
            raise CheckpointError(
                f"{reader.dir} holds {name} as {reader.dtype(name)}, as quantised models do; give "
                f"the unquantised one ({', '.join(FLOATS)})"
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
    # each tensor's own memory becomes the parameter's: one model and one tensor at the most
    state = {name: reader.get(name).to(device, dtype) for name in expected}
    model.load_state_dict(state, assign=True)
    return model


def save_model(
    out_dir: Path | str,
    tensors: Iterable[Entry | tuple[str, Tensor]],
    companions: Path | str,
    config: dict | None = None,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a checkpoint beside its final name, then rename it: it is whole or absent.

    Args:
        tensors: in writing order: entries, or (name, tensor) of what is in memory.
        companions: the directory whose companion files (and, without `config`, whose
            `config.json`) go with the weights.
        config: the JSON object to write as `config.json`.

    Raises:
        CheckpointError, OSError: as `write_checkpoint`.
    """
    companions = Path(companions)
    entries = [held if isinstance(held, Entry) else Entry.of(*held) for held in tensors]

    def finish(folder: Path) -> None:
        for file in COMPANION_FILES:
            if (companions / file).exists():
                shutil.copyfile(companions / file, folder / file)
        if config is None:
            shutil.copyfile(companions / "config.json", folder / "config.json")
        else:
            write_json(folder / "config.json", config)

    write_checkpoint(Path(out_dir), plan_shards(entries, max_shard_bytes), finish)


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

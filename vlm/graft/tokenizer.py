"""Which donor's tokenizer the hybrid speaks, and the files that go with it.

The language donor's where it holds every token of the vision donor's under the same id
(Qwen3's does, and it alone knows `<think>`); the vision donor's where that is the superset.
The chat template and the image processor's settings are the vision donor's either way.
"""

from dataclasses import dataclass
from pathlib import Path
from shutil import copyfile

from tokenizers import Tokenizer

from vlm.checkpoint import CheckpointError, write_json
from vlm.hf_config import read_json

TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
)
PROCESSOR_FILES = (
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
)
IMAGE_FILES = ("preprocessor_config.json", "processor_config.json")
"""One of these has the image processor's settings: the first from transformers 4, both later."""
END_TOKENS = ("<|im_end|>", "<|endoftext|>")


@dataclass(frozen=True)
class TokenizerChoice:
    """The outcome of comparing both donors' tokenizers."""

    donor: str
    """`llm` or `vision`."""
    folder: Path
    size: int
    """Smallest embedding that holds every id."""
    shared: int
    only_llm: list[str]
    only_vision: list[str]


def choose_tokenizer(vision_dir: Path, llm_dir: Path) -> TokenizerChoice:
    """Compare the donors' tokens id by id and take the superset.

    Raises:
        CheckpointError: a token has two ids, an id two tokens, or neither is a superset.
    """
    vision, llm = _vocabulary(vision_dir), _vocabulary(llm_dir)
    by_id = {index: token for token, index in llm.items()}
    clashes = []
    for token, index in vision.items():
        other_id, other_token = llm.get(token), by_id.get(index)
        if other_id is not None and other_id != index:
            clashes.append(f"{token!r} is {index} in the vision donor, {other_id} in the LLM's")
        elif other_id is None and other_token is not None:
            clashes.append(
                f"id {index} is {token!r} in the vision donor, {other_token!r} in the LLM's"
            )
    if clashes:
        more = f" (and {len(clashes) - 3} more)" if len(clashes) > 3 else ""
        raise CheckpointError(f"the donors' tokenizers clash: {'; '.join(clashes[:3])}{more}")
    only_vision = sorted(set(vision) - set(llm), key=vision.get)
    only_llm = sorted(set(llm) - set(vision), key=llm.get)
    if only_vision and only_llm:
        raise CheckpointError(
            f"neither tokenizer holds the other's tokens: only the vision donor has "
            f"{only_vision[:3]}, only the LLM donor has {only_llm[:3]}"
        )
    name, folder, taken = ("vision", vision_dir, vision) if only_vision else ("llm", llm_dir, llm)
    return TokenizerChoice(
        donor=name,
        folder=Path(folder),
        size=max(taken.values()) + 1,
        shared=len(set(vision) & set(llm)),
        only_llm=only_llm,
        only_vision=only_vision,
    )


def _vocabulary(folder: Path) -> dict[str, int]:
    return load_tokenizer(folder).get_vocab(with_added_tokens=True)


def load_tokenizer(folder: Path | str) -> Tokenizer:
    """`tokenizer.json` of a model directory; CheckpointError where there is none."""
    path = Path(folder) / "tokenizer.json"
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; both donors need a fast tokenizer")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001 - the library raises bare Exception
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def write_companions(out: Path, choice: TokenizerChoice, vision_dir: Path) -> None:
    """Tokenizer, chat template, processor and generation settings into `out`.

    Raises:
        CheckpointError: a donor lacks one of them, or it cannot be read.
    """
    for name in TOKENIZER_FILES:
        if (choice.folder / name).exists():
            copyfile(choice.folder / name, out / name)
    settings = _optional_json(choice.folder / "tokenizer_config.json")
    settings.pop("chat_template", None)  # one place for it: chat_template.jinja
    write_json(out / "tokenizer_config.json", settings)
    (out / "chat_template.jinja").write_text(chat_template(vision_dir), encoding="utf-8")
    for name in PROCESSOR_FILES:
        if (vision_dir / name).exists():
            copyfile(vision_dir / name, out / name)
    if not any((out / name).exists() for name in IMAGE_FILES):
        raise CheckpointError(
            f"{vision_dir} has neither {' nor '.join(IMAGE_FILES)}, by which images are resized; "
            "download it whole"
        )
    write_json(out / "generation_config.json", generation_config(choice.folder))


def chat_template(folder: Path) -> str:
    """The template of a model directory, wherever it is kept.

    Raises CheckpointError if it has none, or none that can be read.
    """
    path = folder / "chat_template.jinja"
    if path.exists():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from None
    for name in ("chat_template.json", "tokenizer_config.json"):
        template = _optional_json(folder / name).get("chat_template")
        if isinstance(template, str):
            return template
    raise CheckpointError(f"{folder} has no chat template (chat_template.jinja or .json)")


def generation_config(folder: Path) -> dict:
    """Neutral: where to stop, and no repetition penalty (the vision donor's has 1.05)."""
    tokenizer = load_tokenizer(folder)
    ends = [tokenizer.token_to_id(token) for token in END_TOKENS]
    if None in ends:
        raise CheckpointError(f"{folder}: the tokenizer lacks one of {END_TOKENS}")
    return {"eos_token_id": ends, "pad_token_id": ends[1]}


def _optional_json(path: Path) -> dict:
    return read_json(path) if path.exists() else {}

"""A model directory's tokenizer and processor settings against its `config.json`.

Files of another model load without a word and answer nonsense: checked wherever a model is used.
"""

from pathlib import Path

from tokenizers import Tokenizer

from vlm.checkpoint import CheckpointError
from vlm.config import VLMConfig
from vlm.hf_config import read_json
from vlm.vision import IMAGE_MEAN, IMAGE_STD

MEDIA_TOKENS = {
    "<|vision_start|>": "vision_start_token_id",
    "<|vision_end|>": "vision_end_token_id",
    "<|image_pad|>": "image_token_id",
    "<|video_pad|>": "video_token_id",
}
"""Token -> its key in `config.json`."""
SETTINGS = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")


def check_tokenizer(path: Path, tokenizer: Tokenizer, config: VLMConfig) -> None:
    """The media tokens' ids are the config's, and every id has a row of the embedding.

    Args: path: of `tokenizer.json`, for the error.

    Raises:
        CheckpointError: with the file and both values.
    """
    for token, key in MEDIA_TOKENS.items():
        held, expected = tokenizer.token_to_id(token), getattr(config, key)
        if held != expected:
            raise CheckpointError(
                f"{path}: {token} is {held} in the tokenizer, but {expected} in config.json "
                f"({key}); they belong to different models"
            )
    last = max(tokenizer.get_vocab(with_added_tokens=True).values())
    if last >= config.text.vocab_size:
        raise CheckpointError(
            f"{path} has ids up to {last}, but the embedding {config.text.vocab_size} rows "
            "(vocab_size of config.json); they belong to different models"
        )


def check_settings(folder: Path, config: VLMConfig) -> None:
    """A directory's processor settings cut and normalise images as the tower expects.

    Raises:
        CheckpointError: with the file and both values.
    """
    for name in SETTINGS:
        if (folder / name).exists():
            content = read_json(folder / name)
            parts = (content.get(part) for part in ("image_processor", "video_processor"))
            for settings in (content, *(part for part in parts if part is not None)):
                _check_settings(settings, folder / name, config)


def _check_settings(settings: dict, path: Path, config: VLMConfig) -> None:
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path}: its processors must be JSON objects, not {settings!r:.60}")
    vision = config.vision
    for key, expected in (
        ("patch_size", vision.patch_size),
        ("temporal_patch_size", vision.temporal_patch_size),
        ("merge_size", vision.spatial_merge_size),
        ("image_mean", list(IMAGE_MEAN)),
        ("image_std", list(IMAGE_STD)),
    ):
        if settings.get(key, expected) != expected:
            raise CheckpointError(
                f"{path}: {key} is {settings[key]}, but the tower's is {expected} (config.json); "
                "they belong to different models"
            )

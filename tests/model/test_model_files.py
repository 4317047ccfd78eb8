"""A model's tokenizer and processor settings belong to its config, or its use is refused."""

import json

import pytest

from tests.tiny import write_hybrid
from vlm.checkpoint import CheckpointError
from vlm.data.processor import Processor


@pytest.fixture
def model(tmp_path):
    return write_hybrid(tmp_path / "model")


def test_a_model_of_one_piece_is_used(model):
    Processor.from_pretrained(model)


@pytest.mark.parametrize(
    ("file", "path", "value", "message"),
    [
        ("config.json", ["image_token_id"], 4013, "image_pad.* is 4012 .*, but 4013 in config"),
        ("config.json", ["video_token_id"], 4012, "video_pad.* is 4013 .*, but 4012 in config"),
        ("config.json", ["vision_start_token_id"], 1, "vision_start.* is 4009 .*, but 1 in config"),
        ("config.json", ["vision_end_token_id"], 1, "vision_end.* is 4010 .*, but 1 in config"),
        ("config.json", ["text_config", "vocab_size"], 4025, "ids up to 4025, .* 4025 rows"),
        ("preprocessor_config.json", ["patch_size"], 16, "patch_size is 16, .* is 14"),
        ("preprocessor_config.json", ["merge_size"], 1, "merge_size is 1, .* is 2"),
        ("preprocessor_config.json", ["temporal_patch_size"], 4, "temporal_patch_size is 4, .* 2"),
        ("preprocessor_config.json", ["image_std"], [0.5, 0.5, 0.5], r"image_std is \[0.5"),
        ("video_preprocessor_config.json", ["patch_size"], 16, "patch_size is 16, .* is 14"),
        ("processor_config.json", ["image_processor", "merge_size"], 4, "merge_size is 4, .* is 2"),
        ("processor_config.json", ["video_processor", "patch_size"], 8, "patch_size is 8, .* 14"),
        ("preprocessor_config.json", ["image_processor"], [1], r"must be JSON objects, not \[1\]"),
    ],
)
def test_a_file_of_another_model_is_named_with_both_values(model, file, path, value, message):
    content = json.loads((model / file).read_text()) if (model / file).exists() else {}
    inner = content
    for key in path[:-1]:
        inner = inner.setdefault(key, {})
    inner[path[-1]] = value
    (model / file).write_text(json.dumps(content))
    named = "tokenizer.json" if file == "config.json" else file
    with pytest.raises(CheckpointError, match=f"{named}:? .*{message}"):
        Processor.from_pretrained(model)

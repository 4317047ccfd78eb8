"""The files beside an export's weights, so that every reader samples, resizes and asks alike.

transformers reads `processor_config.json` alone; vLLM reads how a video is sampled from
`video_preprocessor_config.json`; older tools read `preprocessor_config.json`. All three are
written and say the same.
"""

import json
from pathlib import Path
from typing import Literal

from serve.limits import frame_sampling, frame_size, image_size
from vlm.checkpoint import CheckpointError
from vlm.config import VLMConfig
from vlm.data.limits import Limits
from vlm.graft.tokenizer import chat_template, generation_config, load_tokenizer
from vlm.hf_config import read_json
from vlm.vision import IMAGE_MEAN, IMAGE_STD

Format = Literal["hf", "vllm_stock", "stock"]
"""`stock` is the literal variant's own: a plain qwen2_5_vl that stock classes compute exactly."""
HF_CODE = Path(__file__).parents[1] / "vlm" / "hf"
CODE_FILES = ("configuration_graft_vl.py", "modeling_graft_vl.py")
AUTO_MAP = {
    "AutoConfig": "configuration_graft_vl.GraftVLConfig",
    "AutoModel": "modeling_graft_vl.GraftVLModel",
    "AutoModelForImageTextToText": "modeling_graft_vl.GraftVLForConditionalGeneration",
}
GUARD = "DO_NOT_LOAD_WITH_STOCK_TRANSFORMERS.txt"
STOCK_WARNING = (
    "This folder is for vLLM alone. It calls itself qwen2_5_vl and carries QK-norm, which vLLM "
    "honours (text_config.qk_norm) and stock transformers drops without a word: there the model "
    "would answer nonsense. For transformers export with --format hf."
)
LITERAL = "LITERAL_VARIANT.txt"
LITERAL_NOTE = (
    "This is the literal variant of the graft: a plain Qwen2.5-VL, which stock transformers and "
    "stock vLLM load without any code of GraftVL. Qwen3's QK-norm was dropped when it was built, "
    "so that what it says of text is what training taught it since. Text after a video is placed "
    "as in training by vLLM; transformers counts the video's height and width alone, and differs "
    "where a video is longer than it is wide. transformers' processor samples the frames of a "
    "video only where it is called with do_sample_frames=True."
)
# Qwen3's convention: thinking is switched off by an empty thought at the start of the answer.
NO_THINKING = (
    "{%- if add_generation_prompt and enable_thinking is defined and enable_thinking is false -%}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}{%- endif -%}"
)


def processor_files(limits: Limits, config: VLMConfig, format: Format) -> dict[str, dict]:
    """File name -> JSON object: the image, video and joint processor's settings."""
    shared = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(IMAGE_MEAN),
        "image_std": list(IMAGE_STD),
        "rescale_factor": 1 / 255,
        "resample": 3,
        "patch_size": config.vision.patch_size,
        "temporal_patch_size": config.vision.temporal_patch_size,
        "merge_size": config.vision.spatial_merge_size,
    }
    image = shared | {
        "image_processor_type": "Qwen2VLImageProcessor",
        "size": image_size(limits),
    }
    video = shared | {
        "video_processor_type": "Qwen2VLVideoProcessor",
        "size": frame_size(limits),
        **frame_sampling(limits),
        # stock vLLM samples before the processor, and its frames would be sampled again
        "do_sample_frames": format == "hf",
        "cap_pixels_per_frame": False,
    }
    kind = {"processor_class": "Qwen2_5_VLProcessor"}
    return {
        "preprocessor_config.json": kind | image,
        "video_preprocessor_config.json": kind | video,
        "processor_config.json": kind | {"image_processor": image, "video_processor": video},
    }


def export_config(raw: dict, config: VLMConfig, format: Format) -> dict:
    """The export's `config.json` from the checkpoint's."""
    if format == "hf":
        return raw | {"auto_map": AUTO_MAP}
    if format == "stock":
        return raw
    text = config.text
    if text.num_attention_heads * text.head_dim != text.hidden_size:
        raise CheckpointError(
            f"stock vLLM cannot hold this shape: {text.num_attention_heads} heads of "
            f"{text.head_dim} are not the hidden size {text.hidden_size}; export with --format hf"
        )
    return raw | {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "text_config": raw["text_config"] | {"model_type": "qwen2_5_vl_text", "qk_norm": True},
    }


def files_beside(
    source: Path, limits: Limits, config: VLMConfig, format: Format, card: str
) -> dict[str, str]:
    """File name -> text of all that lies beside the weights, the config and the tokenizer's tables.

    Raises:
        CheckpointError: the source has no chat template, or a tokenizer without end tokens.
    """
    files = {"README.md": card, "chat_template.jinja": template_with_switch(source)}
    settings = source / "tokenizer_config.json"
    tokenizer = read_json(settings) if settings.exists() else {}
    tokenizer.pop("chat_template", None)  # one place for it
    content = processor_files(limits, config, format) | {
        # prompts of a batch are padded in front, or their answers would follow the padding
        "tokenizer_config.json": tokenizer | {"padding_side": "left"},
        "generation_config.json": generation_config(source),
    }
    files |= {name: json.dumps(value, indent=2) + "\n" for name, value in content.items()}
    if format == "hf":
        return files | {name: (HF_CODE / name).read_text("utf-8") for name in CODE_FILES}
    if format == "stock":
        return files | {LITERAL: LITERAL_NOTE + "\n"}
    return files | {GUARD: STOCK_WARNING + "\n"}


def template_with_switch(source: Path) -> str:
    """The source's chat template, with Qwen3's switch for thinking where the tokenizer thinks."""
    template = chat_template(source)
    thinks = load_tokenizer(source).token_to_id("<think>") is not None
    if thinks and "enable_thinking" not in template:
        template = template.rstrip("\n") + NO_THINKING
    return template

"""The hybrid for transformers: `import vlm.hf` teaches its Auto classes the type `graft_vl`.

An export carries a copy of these files (`auto_map` in its config.json), so that it loads
elsewhere with `trust_remote_code=True` and without this package.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    Qwen2_5_VLProcessor,
)

from vlm.hf.configuration_graft_vl import GraftVLConfig, GraftVLTextConfig
from vlm.hf.modeling_graft_vl import GraftVLForConditionalGeneration, GraftVLModel

AutoConfig.register("graft_vl", GraftVLConfig, exist_ok=True)
AutoConfig.register("graft_vl_text", GraftVLTextConfig, exist_ok=True)
AutoModel.register(GraftVLConfig, GraftVLModel, exist_ok=True)
AutoModelForImageTextToText.register(GraftVLConfig, GraftVLForConditionalGeneration, exist_ok=True)
AutoProcessor.register(GraftVLConfig, Qwen2_5_VLProcessor, exist_ok=True)

# so that save_pretrained takes the code along
GraftVLConfig.register_for_auto_class()
GraftVLModel.register_for_auto_class("AutoModel")
GraftVLForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = ["GraftVLConfig", "GraftVLForConditionalGeneration", "GraftVLModel", "GraftVLTextConfig"]

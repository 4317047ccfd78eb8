"""Gives ms-swift (`--external_plugins`) the tiny tokenizer's ids instead of the real one's."""

from swift.template.templates.qwen import Qwen2VLTemplate

Qwen2VLTemplate.image_token_id = 4012
Qwen2VLTemplate.video_token_id = 4013

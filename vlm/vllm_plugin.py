"""vLLM's entry point (`vllm.general_plugins`): every vLLM process calls `register` as it starts."""

ARCHITECTURE = "GraftVLForConditionalGeneration"


def register() -> None:
    """Teach vLLM the hybrid's config and, by name only, its model (`vlm/vllm_model.py`)."""
    from vllm import ModelRegistry

    import vlm.hf
    import vlm.vllm_media  # noqa: F401 - both register themselves, vlm.hf with transformers

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, f"vlm.vllm_model:{ARCHITECTURE}")

"""What vLLM sees in a request, and what it answers (`serve/parity.py`).

vLLM runs in this process and is asked as a client asks, by messages with encoded images. What it
made of them is taken from the request that it hands to its engine.
"""

import os
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path

import torch
from torch import Tensor

from serve.limits import vllm_arguments
from serve.request import request_messages
from serve.serve_config import ServeConfig
from serve.views import TOP, View, device
from serve.vllm_env import is_cpu, vllm_environment
from vlm.data.limits import Limits
from vlm.data.schema import Sample
from vlm.hf_config import read_config


class VLLM:
    """An engine in this process; one at a time."""

    def __init__(self, folder: Path, limits: Limits, dtype: torch.dtype, **options) -> None:
        """
        Args:
            options: further arguments of vLLM's `LLM`.
        """
        os.environ |= vllm_environment() | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        from vllm import LLM

        most = read_config(folder).text.max_position_embeddings
        options.setdefault("max_model_len", min(most, ServeConfig.max_model_len))
        self.llm = LLM(
            str(folder),
            dtype=str(dtype).removeprefix("torch."),
            enforce_eager=is_cpu(),
            mm_processor_cache_gb=0,  # what is cached would not be handed over again
            **vllm_arguments(limits, ServeConfig.max_images, ServeConfig.max_videos),
            **options,
        )
        [self.input_norm] = self.llm.apply_model(attrgetter("visual.input_norm"))
        [self.kind] = self.llm.apply_model(type)
        self.requests: list = []
        processor = self.llm.llm_engine.input_processor
        process = processor.process_inputs

        def remember(*args, **kwargs):
            self.requests.append(process(*args, **kwargs))
            return self.requests[-1]

        processor.process_inputs = remember

    def views(self, samples: Sequence[Sample], new: int) -> list[View]:
        """All requests at once, `new` tokens each."""
        from vllm import SamplingParams

        self.requests.clear()
        sampling = SamplingParams(temperature=0, max_tokens=new, logprobs=TOP, ignore_eos=True)
        conversations = [request_messages(sample) for sample in samples]
        outputs = self.llm.chat(conversations, sampling, use_tqdm=False)
        return [self._view(*pair) for pair in zip(self.requests, outputs, strict=True)]

    def _view(self, request, output) -> View:
        features = sorted(request.mm_features or (), key=lambda feature: feature.mm_position.offset)
        grids, pixels = [], []
        for feature in features:
            suffix = {"image": "", "video": "_videos"}[feature.modality]
            grid = feature.data[f"{feature.modality}_grid_thw"].data
            grids.append(tuple(grid.tolist()))
            pixels.append(self._normalised(feature.data[f"pixel_values{suffix}"].data))
        model = _PositionsOf(self.kind, self.llm.llm_engine.model_config.hf_config)
        answer = output.outputs[0]
        return View(
            ids=list(request.prompt_token_ids),
            grids=grids,
            pixels=pixels,
            positions=model.get(request.prompt_token_ids, features),
            logprobs={token: entry.logprob for token, entry in answer.logprobs[0].items()},
            tokens=list(answer.token_ids),
        )

    def _normalised(self, levels: Tensor) -> Tensor:
        """What the processor leaves to the model's first layer."""
        return self.input_norm(levels.to(device()), torch.float32).cpu()

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()


class _PositionsOf:
    """vLLM's M-RoPE positions, by the loaded model's class without its weights."""

    def __init__(self, kind: type, config) -> None:
        self.config = config
        self.get_positions = kind.get_mrope_input_positions
        self.iter_mm_grid_thw = lambda features: kind.iter_mm_grid_thw(self, features)

    def get(self, ids: list[int], features: list) -> Tensor:
        return self.get_positions(self, ids, features)[0]

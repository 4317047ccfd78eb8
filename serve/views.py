"""What our model and transformers see in a request, and what they answer (`serve/parity.py`).

Legend: t prompt tokens, P patches, V vocabulary.
"""

import gc
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from serve.conversation import without_thoughts
from serve.request import request_messages
from serve.vllm_env import is_cpu
from serve.witness import media_kinds, our_logits
from vlm.checkpoint import CheckpointError, load_model
from vlm.config import VLMConfig
from vlm.data.collate import collate
from vlm.data.image import load_image
from vlm.data.processor import Processor
from vlm.data.schema import Sample, Video
from vlm.data.video import load_frames, video_info
from vlm.generate import generate
from vlm.vision import normalise

TOP = 20
"""Log-probabilities that vLLM gives at most."""
POSITION_INPUTS = ("mm_token_type_ids", "image_grid_thw", "video_grid_thw", "second_per_grid_ts")


@dataclass(frozen=True)
class View:
    """How one engine sees a request, and its greedy answer."""

    ids: list[int]
    """t tokens, placeholders expanded."""
    grids: list[tuple[int, ...]]
    """(time, height, width) in patches, in order of appearance."""
    pixels: list[Tensor] = field(repr=False)
    """(P, patch_dim) float32 of each image or video, normalised."""
    positions: Tensor = field(repr=False)
    """(3, t) int64."""
    logprobs: dict[int, float] = field(repr=False)
    """Of the most likely first tokens."""
    tokens: list[int]
    """The greedy continuation, end tokens not heeded."""


def our_views(
    folder: Path, samples: Sequence[Sample], processor: Processor, dtype: torch.dtype, new: int
) -> list[View]:
    """Through vlm alone, `new` tokens each."""
    model = load_model(folder, dtype, device()).eval()
    views = []
    for sample in samples:
        example = processor.prompt(without_thoughts(sample))
        batch = collate([example], model.config).to(device())
        tokens = generate(model, batch, max_new_tokens=new, stop_ids=())[0]
        sizes = [t * h * w for t, h, w in example.grid_thw]
        views.append(
            View(
                ids=example.input_ids.tolist(),
                grids=list(example.grid_thw),
                pixels=list(normalise(example.patches).split(sizes)),
                positions=example.position_ids,
                logprobs=top_logprobs(our_logits(model, example)[-1]),
                tokens=tokens,
            )
        )
    free(model)
    return views


def transformers_views(
    folder: Path, samples: Sequence[Sample], processor: Processor, dtype: torch.dtype, new: int
) -> list[View]:
    """Through the export's own code and processor.

    Images are those that our loader makes, since transformers drops EXIF and transparency. Videos
    are given whole, so that the exported processor samples them.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig
    from transformers.image_processing_backends import TorchvisionBackend

    hf_processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    if not isinstance(hf_processor.image_processor, TorchvisionBackend):
        raise CheckpointError(
            "transformers cannot import torchvision and would resize otherwise; install torchvision"
        )
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, trust_remote_code=True)
    model = model.to(device()).eval()
    model.generation_config = GenerationConfig()
    settings = GenerationConfig(max_new_tokens=new, do_sample=False, pad_token_id=0)
    views = []
    for sample in samples:
        inputs = hf_processor_inputs(hf_processor, sample, processor)
        ids = inputs["input_ids"][0]
        grids, pixels = media_in_order(inputs, ids, processor.config)
        positions = torch.arange(len(ids)).expand(3, -1)
        if grids:
            given = {name: inputs[name] for name in POSITION_INPUTS if name in inputs}
            positions = model.model.get_rope_index(ids[None], **given)[0][:, 0]
        inputs = inputs.to(device())
        with torch.inference_mode():
            logits = model(**inputs).logits[0, -1].cpu()
            answer = model.generate(**inputs, generation_config=settings)
        tokens = answer[0, len(ids) :].tolist()
        views.append(View(ids.tolist(), grids, pixels, positions, top_logprobs(logits), tokens))
    free(model)
    return views


def hf_processor_inputs(hf_processor, sample: Sample, processor: Processor):
    """What the exported processor makes of a sample.

    Videos are given whole, for it to sample; lists of frames are sampled already, and it cannot
    take both kinds at once.
    """
    messages = request_messages(sample)
    for message in messages:
        if isinstance(message["content"], str):
            message["content"] = [{"type": "text", "text": message["content"]}]
        for part in message["content"]:
            part["type"] = part["type"].removesuffix("_url")  # the media themselves come apart
    text = hf_processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    media: dict = {}
    if sample.images:
        media["images"] = [Image.fromarray(load_image(item).numpy()) for item in sample.images]
    if sample.videos:
        whole = not any(isinstance(video, tuple) for video in sample.videos)
        pairs = [whole_video(video, processor, whole) for video in sample.videos]
        media["videos"] = [frames for frames, _ in pairs]
        media["video_metadata"] = [metadata for _, metadata in pairs]
        media["do_sample_frames"] = whole
    return hf_processor(text=[text], return_tensors="pt", **media)


def whole_video(video: Video, processor: Processor, whole: bool) -> tuple[np.ndarray, dict]:
    """(frames (n, h, w, 3) uint8, transformers' metadata): all frames, or those that are seen."""
    info = video_info(video, processor.limits.fps)
    seen = range(info.frames) if whole else processor.reader.frames_seen(video, info)
    frames = load_frames(video, seen, info.height, info.width).numpy()
    metadata = {"total_num_frames": info.frames, "fps": info.fps, "frames_indices": list(seen)}
    return frames, metadata | {"duration": info.frames / info.fps}


def media_in_order(inputs, ids: Tensor, config: VLMConfig) -> tuple[list[tuple], list[Tensor]]:
    """Grids and pixels of images and videos, merged into their order of appearance."""
    waiting: dict[str, list] = {"image": [], "video": []}
    for kind, values in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if values in inputs:
            grids = [tuple(grid) for grid in inputs[f"{kind}_grid_thw"].tolist()]
            pixels = inputs[values].float().split([t * h * w for t, h, w in grids])
            waiting[kind] = list(zip(grids, pixels, strict=True))
    order = [waiting[kind].pop(0) for kind in media_kinds(ids, config)]
    return [grid for grid, _ in order], [pixels for _, pixels in order]


def top_logprobs(logits: Tensor) -> dict[int, float]:
    """The TOP most likely tokens of logits (V,), with their log-probabilities."""
    values, ids = logits.float().log_softmax(-1).topk(min(TOP, len(logits)))
    return dict(zip(ids.tolist(), values.tolist(), strict=True))


def device() -> str:
    return "cpu" if is_cpu() else "cuda"


def free(model: torch.nn.Module) -> None:
    """Give the model's memory back: the next one may need all of it."""
    model.to("meta")
    gc.collect()
    if not is_cpu():
        torch.cuda.empty_cache()

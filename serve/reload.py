"""The reload check: what was written, loaded as a stranger would, gives our logits.

The export's own code is loaded through `auto_map`, as on a machine without GraftVL; the literal
variant by transformers' own classes. The format `vllm_stock` is not for transformers: our own
reader takes it, biases and all.
"""

import gc
import io
from collections import Counter
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from serve.export_files import Format
from serve.witness import hf_logits, our_logits
from vlm.checkpoint import CheckpointError, TensorReader, load_model
from vlm.config import VLMConfig
from vlm.data.limits import Limits
from vlm.data.processor import Example, Processor
from vlm.data.schema import IMAGE_TAG, Message, Sample

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest difference as a share of the largest logit; other kernels sum in another order. The
weights themselves are compared bit for bit."""


def check_reload(source: Path, exported: Path, limits: Limits, format: Format) -> None:
    """Raise CheckpointError unless the export tokenises, resizes and computes as we do.

    One model at a time is in memory, in the export's dtype, on a GPU where there is one.
    """
    compare_tensors(source, exported)
    processor = Processor.from_pretrained(source, limits)
    samples = (text_sample(), image_sample())
    examples = [processor.prompt(sample) for sample in samples]
    if format != "vllm_stock":
        check_processor(exported, samples[1], examples[1])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = stored_dtype(exported)
    model = load_model(source, dtype, device).eval()
    expected = [our_logits(model, example) for example in examples]
    del model
    gc.collect()
    config = processor.config
    load = reload_with_us if format == "vllm_stock" else reload_with_transformers
    for name, ours, theirs in zip(
        ("text", "image"), expected, load(exported, examples, config, dtype, device), strict=True
    ):
        delta = float((ours - theirs).abs().max() / ours.abs().max())
        if not delta <= TOLERANCE[dtype]:
            raise CheckpointError(
                f"{exported} answers a {name} prompt otherwise than {source}: the logits differ by "
                f"{delta:.1e} of the largest; it was not given its final name"
            )


def compare_tensors(source: Path, exported: Path) -> None:
    """Every tensor of the export is the source's own, in the export's dtype."""
    ours, theirs = TensorReader(source), TensorReader(exported)
    for name in theirs.names():
        written = theirs.get(name)
        if name not in ours.names():
            same = name.endswith(".bias") and not written.any()  # what stock classes insist on
        else:
            same = torch.equal(written, ours.get(name).to(written.dtype))
        if not same:
            raise CheckpointError(f"{exported}: {name} is not what {source} holds; export it again")


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype that most of the weights have."""
    reader = TensorReader(folder)
    return Counter(reader.get(name).dtype for name in reader.names()).most_common(1)[0][0]


def reload_with_transformers(
    folder: Path, examples: list[Example], config: VLMConfig, dtype: torch.dtype, device: str
) -> list[Tensor]:
    from transformers import AutoModelForImageTextToText

    model, info = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=dtype, trust_remote_code=True, output_loading_info=True
    )
    strangers = info["missing_keys"] | info["unexpected_keys"] | info["mismatched_keys"]
    if strangers:
        raise CheckpointError(f"{folder}: transformers finds no place for {sorted(strangers)[:3]}")
    model = model.to(device).eval()
    return [hf_logits(model, example, config) for example in examples]


def reload_with_us(
    folder: Path, examples: list[Example], config: VLMConfig, dtype: torch.dtype, device: str
) -> list[Tensor]:
    model = load_model(folder, dtype, device).eval()
    return [our_logits(model, example) for example in examples]


def check_processor(folder: Path, sample: Sample, example: Example) -> None:
    """The exported processor makes our ids and grids of an image that must be resized."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    text = sample.messages[-1].content.replace(IMAGE_TAG, "")
    content = [{"type": "image"}, {"type": "text", "text": text}]
    rendered = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    image = Image.open(io.BytesIO(sample.images[0]))
    inputs = processor(text=[rendered], images=[image], return_tensors="pt")
    if inputs["image_grid_thw"].tolist() != [list(grid) for grid in example.grid_thw]:
        raise CheckpointError(f"{folder}: transformers' processor resizes otherwise than ours")
    if inputs["input_ids"][0].tolist() != example.input_ids.tolist():
        raise CheckpointError(
            f"{folder}: transformers' processor makes other tokens than ours of a prompt; its chat "
            "template is not Qwen's"
        )


def text_sample() -> Sample:
    return Sample("reload check", (Message("user", "What is 7 + 5? 七加五是多少?"),))


def image_sample() -> Sample:
    """A coloured gradient that is no multiple of the patch size."""
    rows = torch.arange(150)[:, None].expand(150, 220)
    columns = torch.arange(220)[None].expand(150, 220)
    pixels = torch.stack([rows, columns, (rows * columns) // 150], dim=2).to(torch.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, "PNG")
    question = Message("user", IMAGE_TAG + "What do you see?")
    return Sample("reload check", (question,), (buffer.getvalue(),))

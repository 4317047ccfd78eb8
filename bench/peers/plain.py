"""A plain transformers loop, as a user would write it: Trainer, processor, a collator that pads.

    python -m bench.peers.plain options.json

The options are those of `PlainOptions`. `log.jsonl` in the output directory has a line a step.
Of this model Trainer takes the mean over the targets of a micro-batch, and then the mean over the
micro-batches (`accepts_loss_kwargs` is false), so that a target weighs more the fewer its
micro-batch has: its gradient is that of the global mean only where the batch is one micro-batch.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers import (
    AutoProcessor,
    Qwen2_5_VLForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.image_utils import SizeDict

IGNORED = -100


@dataclass(frozen=True)
class PlainOptions:
    """What differs between its two uses; all else is the recipe's."""

    model: str
    data: str
    output_dir: str
    min_pixels: int
    max_pixels: int
    merger_alone: bool
    """Stage 1; else everything trains."""
    max_steps: int
    micro_batch: int
    accumulation: int
    gradient_checkpointing: bool
    workers: int
    max_grad_norm: float
    seed: int


def open_processor(model: str, min_pixels: int, max_pixels: int):
    """transformers' processor of a model, with limits of one's own."""
    processor = AutoProcessor.from_pretrained(model)
    # the model's own min_pixels and max_pixels win over a `size` that from_pretrained is given
    processor.image_processor.size = SizeDict(shortest_edge=min_pixels, longest_edge=max_pixels)
    return processor


class Conversations(Dataset):
    """Rows of a file as the processor gives them, the answer's tokens as labels."""

    def __init__(self, path: str, processor) -> None:
        self.rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
        self.processor = processor

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        row = self.rows[number]
        images = [Image.open(path).convert("RGB") for path in row.get("images", [])]
        *asked, answer = row["messages"]
        prompt = self.processor.apply_chat_template(_parts(asked), add_generation_prompt=True)
        inputs = self.processor(text=[prompt], images=images or None, return_tensors="pt")
        reply = self.processor.tokenizer(
            answer["content"] + "<|im_end|>\n", add_special_tokens=False, return_tensors="pt"
        ).input_ids
        labels = torch.cat([torch.full_like(inputs.input_ids, IGNORED), reply], dim=1)
        media = {k: inputs[k] for k in ("pixel_values", "image_grid_thw") if k in inputs}
        ids = torch.cat([inputs.input_ids, reply], dim=1)
        return {"input_ids": ids[0], "labels": labels[0], **media}


def _parts(turns: list[dict]) -> list[dict]:
    """Turns as the chat template wants them: each `<image>` a part of its own."""
    image = {"type": "image"}
    parts = []
    for turn in turns:
        before, *pieces = turn["content"].split("<image>")
        content = [{"type": "text", "text": before}] if before else []
        for piece in pieces:
            content += [image, {"type": "text", "text": piece}] if piece else [image]
        parts.append({"role": turn["role"], "content": content})
    return parts


class PadRight:
    """Samples to a batch as long as its longest."""

    def __init__(self, pad_id: int, image_id: int) -> None:
        self.pad_id, self.image_id = pad_id, image_id

    def __call__(self, samples: list[dict]) -> dict[str, torch.Tensor]:
        def pad(name: str, value: int) -> torch.Tensor:
            rows = [sample[name] for sample in samples]
            return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

        ids = pad("input_ids", self.pad_id)
        lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
        batch = {
            "input_ids": ids,
            "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long(),
            "labels": pad("labels", IGNORED),
            "mm_token_type_ids": (ids == self.image_id).int(),
        }
        for name in ("pixel_values", "image_grid_thw"):
            if rows := [sample[name] for sample in samples if name in sample]:
                batch[name] = torch.cat(rows)
        return batch


class PlainTrainer(Trainer):
    """Trainer, for whom a micro-batch of text alone is an error where the merger alone trains."""

    def compute_loss(self, model, inputs, *args, **options):
        loss = super().compute_loss(model, inputs, *args, **options)
        if loss.requires_grad:
            return loss
        return loss + 0 * sum(p.sum() for p in model.parameters() if p.requires_grad)


class LogSteps(TrainerCallback):
    """`log.jsonl`: a line a step, written as the step ends."""

    def __init__(self, folder: str) -> None:
        self.path = Path(folder) / "log.jsonl"

    def on_log(self, args, state, control, logs=None, **_) -> None:
        if "loss" in logs:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(logs | {"step": state.global_step}) + "\n")


def run(options: PlainOptions) -> None:
    """Train by the options, and save the last step's checkpoint."""
    processor = open_processor(options.model, options.min_pixels, options.max_pixels)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        options.model, dtype=torch.float32, attn_implementation="sdpa"
    )
    if options.merger_alone:
        model.requires_grad_(False)
        model.model.visual.merger.requires_grad_(True)
    arguments = TrainingArguments(
        output_dir=options.output_dir,
        max_steps=options.max_steps,
        per_device_train_batch_size=options.micro_batch,
        gradient_accumulation_steps=options.accumulation,
        gradient_checkpointing=options.gradient_checkpointing,
        learning_rate=5e-6,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,  # below 1 it is a share
        weight_decay=0.1,
        adam_beta1=0.9,
        adam_beta2=0.95,
        adam_epsilon=1e-8,
        max_grad_norm=options.max_grad_norm,
        dataloader_num_workers=options.workers,
        train_sampling_strategy="sequential",  # the file has the order of all systems
        remove_unused_columns=False,
        logging_steps=1,
        save_steps=1000,
        save_total_limit=10,
        seed=options.seed,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = PlainTrainer(
        model=model,
        args=arguments,
        train_dataset=Conversations(options.data, processor),
        data_collator=PadRight(processor.tokenizer.pad_token_id, model.config.image_token_id),
        callbacks=[LogSteps(options.output_dir)],
    )
    trainer.train()


def main() -> None:
    run(PlainOptions(**json.loads(Path(sys.argv[1]).read_text())))


if __name__ == "__main__":
    main()

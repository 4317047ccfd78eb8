"""What a run is told: every option, its default and what it may be.

Flags keep the recipe's names. `train/command_line.py` reads them.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from math import inf
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from vlm.data.limits import Limits
from vlm.data.pack import Budget, Mode
from vlm.hub import Hub
from vlm.recompute import Policy


class UsageError(ValueError):
    """An option, a path or a checkpoint that cannot be used; the message says what to do."""


class Range(NamedTuple):
    """What a number may be."""

    says: str
    holds: Callable[[float], bool]
    """False for nan too, and for infinity unless that has a meaning."""


POSITIVE = Range("above 0", lambda x: 0 < x < inf)
POSITIVE_OR_INFINITE = Range("above 0", lambda x: x > 0)
NOT_NEGATIVE = Range("0 or above", lambda x: 0 <= x < inf)
SHARE = Range("in 0..1", lambda x: 0 <= x <= 1)
BELOW_ONE = Range("at least 0 and below 1", lambda x: 0 <= x < 1)
INTERVAL = Range("-1, 0 or a number of steps", lambda x: x >= -1)
SEED = Range("in 0..2^63-1", lambda x: 0 <= x < 1 << 63)


def within(allowed: Range, default: Any) -> Any:
    """A number among the options, checked wherever it comes from; None is no number."""
    return field(default=default, metadata={"allowed": allowed})


@dataclass(frozen=True)
class TrainConfig:
    """Options of train/sft.py; the defaults are the recipe's and its peer's."""

    model: str | Path
    """The model to start from: its directory, or OWNER/NAME[@REVISION] of a hub."""
    dataset: list[str | dict[str, Any]]
    """Files, directories or data sets of the hub, `PATH` or `PATH#LIMIT`; in YAML also mappings
    with the fields of `vlm.data.sources.SourceSpec`."""
    output_dir: Path
    """The run's directory; the same command resumes from what it finds there."""
    hub: Hub = "huggingface"
    """Where a model or a data set is taken from which is no path here."""
    media_root: Path | None = None
    """What paths of media are relative to, and may not leave (default: the data file's directory,
    and anywhere)."""
    allow_urls: bool = False
    """Download images that are given as http(s) URLs."""

    streaming: bool = False
    """Read the data from its beginning to its end, window by window, without an index: for shards
    (.tar, .parquet, .jsonl; also globs and URLs of fsspec) too many to be measured first. Needs
    max_steps."""
    stream_window: int = within(POSITIVE, 16)
    """Steps whose samples are read, held in memory and shuffled together."""

    freeze_vit: bool = False
    """The ViT, without the merger, does not train."""
    freeze_aligner: bool = False
    """The merger does not train."""
    freeze_llm: bool = False
    """Decoder, embedding and head do not train."""
    last_vit_layers: int | None = within(POSITIVE, None)
    """Of the ViT, train this many of the last blocks alone."""
    last_llm_layers: int | None = within(POSITIVE, None)
    """Of the language model, train this many of the last layers alone, with what follows them:
    the final norm, and the head where it is not the embedding too."""
    freeze_parameters: list[str] = field(default_factory=list)
    """Patterns (`*` and `?`) of parameter names that are frozen whatever the flags above say."""
    trainable_parameters: list[str] = field(default_factory=list)
    """Patterns of parameter names that train, whatever all of the above say."""

    num_train_epochs: int = within(POSITIVE, 3)
    """Times that the data is gone through, where max_steps is not given; whole numbers."""
    max_steps: int | None = within(POSITIVE, None)
    """Optimiser steps in all; overrides num_train_epochs."""
    per_device_train_batch_size: int = within(POSITIVE, 2)
    """Samples in a micro-batch, where the plan is `samples`."""
    gradient_accumulation_steps: int = within(POSITIVE, 8)
    """Micro-batches per step, where the plan is `samples` and global_batch_size is not given."""
    global_batch_size: int | None = within(POSITIVE, None)
    """Samples per optimiser step; fixed at the run's first start (default:
    per_device_train_batch_size x gradient_accumulation_steps x ranks)."""
    plan: Mode = "packed"
    """How a step's samples become micro-batches: as few as the budgets allow, of equal FLOPs on
    all ranks; or `samples`, a fixed number in each. Neither changes the gradient."""
    token_budget: int = within(POSITIVE, 8192)
    """Tokens of a packed micro-batch; at least max_length."""
    patch_budget: int = within(POSITIVE, 20480)
    """Patches of a packed micro-batch (a sample above it goes alone): four images of 1003520
    pixels."""
    auto_budget: bool = False
    """Derive token_budget and patch_budget from the device's memory at the run's first start; the
    numbers above are not used then, but for a stream's patches per token."""
    skip_text_only: bool = True
    """While the language model is frozen: leave samples without image or video out, which train
    nothing; their targets still count, so that the gradient is the same."""

    learning_rate: float = within(POSITIVE, 5e-6)
    """The highest rate of the schedule, for all that has none of its own below."""
    vit_lr: float | None = within(NOT_NEGATIVE, None)
    """Of the ViT instead (default: as learning_rate)."""
    aligner_lr: float | None = within(NOT_NEGATIVE, None)
    """Of the merger instead (default: as learning_rate)."""
    weight_decay: float = within(NOT_NEGATIVE, 0.1)
    """Of weight matrices; norms and biases have none."""
    vit_weight_decay: float | None = within(NOT_NEGATIVE, None)
    """Of the ViT instead (default: as weight_decay)."""
    aligner_weight_decay: float | None = within(NOT_NEGATIVE, None)
    """Of the merger instead (default: as weight_decay)."""
    adam_beta1: float = within(BELOW_ONE, 0.9)
    adam_beta2: float = within(BELOW_ONE, 0.95)
    adam_epsilon: float = within(POSITIVE, 1e-8)
    max_grad_norm: float = within(POSITIVE_OR_INFINITE, 1.0)
    """The gradient, over all that trains, is scaled down to this norm; `.inf`: never."""
    lr_scheduler_type: str = "cosine"
    """After the warm-up: `cosine`, `linear`, `constant` or `wsd` (warm-up, stable, decay), which
    stays at the full rate and falls to 0 over the last steps; `SCHEDULES` of train/optim.py."""
    warmup_ratio: float = within(BELOW_ONE, 0.05)
    """Share of the steps over which the rates rise from 0."""
    warmup_steps: int | None = within(NOT_NEGATIVE, None)
    """Their number instead."""
    decay_ratio: float = within(BELOW_ONE, 0.1)
    """Share of the steps after the warm-up over which `wsd` falls."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of weights and activations; bfloat16 keeps float32 masters."""
    gradient_checkpointing: bool | Policy = True
    """What blocks keep for the backward pass (`vlm/recompute.py`): true is `full`, false `none`."""
    vit_gradient_checkpointing: bool | Policy | None = None
    """The same for the ViT alone (default: as gradient_checkpointing)."""
    compile: bool = False
    """Fuse what the blocks of both towers do between products, for a GPU (`vlm/compile.py`)."""
    deepspeed: str | None = "zero2"
    """`zero1`, `zero2`, `zero2_offload` (masters and moments in the host's memory), or a DeepSpeed
    JSON file whose keys go over zero2's; null: one process, no DeepSpeed."""
    ddp_timeout: int = within(POSITIVE, 900)
    """Seconds after which a rank that does not answer is called missing and the run ends."""
    deterministic: bool = False
    """The same bits in every run on the same hardware, at some cost in speed."""

    max_length: int = within(POSITIVE, 8192)
    """Most tokens of a sample."""
    truncation: Literal["delete", "left", "right"] = "delete"
    """What is done to a longer one: dropped and recorded, or its text cut (never its media)."""
    think: Literal["keep", "strip_history"] = "keep"
    """Thoughts (`<think>...</think>`) in answers before a sample's last question: learnt as they
    stand, or removed, as Qwen3's template does."""
    min_pixels: int = Limits.min_pixels
    """Least of an image; a smaller one is enlarged."""
    max_pixels: int = Limits.max_pixels
    """Most of an image; a larger one is scaled down."""
    video_max_pixels: int = Limits.video_max_pixels
    """Most of each frame of a video."""
    fps: float = Limits.fps
    """Frames sampled per second of video."""
    fps_max_frames: int = Limits.fps_max_frames
    """Most frames of a video."""
    max_bad_fraction: float = within(SHARE, 0.01)
    """Share of bad samples that stops the run."""
    on_bad: Literal["skip", "error"] = "skip"
    """A bad sample is recorded and left out, or ends the run."""
    dataloader_num_workers: int = within(NOT_NEGATIVE, 4)
    """Processes per rank that read and encode samples."""
    dataloader_timeout: int = within(POSITIVE, 600)
    """Seconds without data after which the workers are called stuck and the run ends."""
    dataset_num_proc: int = within(POSITIVE, 8)
    """Processes that index the data."""
    feature_cache: Path | None = None
    """A folder for what a frozen ViT makes of images and videos, so that later epochs, and other
    runs of the same ViT, neither decode nor compute it again."""
    feature_cache_gb: float = within(POSITIVE, 100.0)
    """GB (10^9 bytes) that the folder may hold; once it is full nothing more is kept."""

    val_dataset: list[str | dict[str, Any]] = field(default_factory=list)
    """Held-out data, in the form of `dataset`."""
    split_dataset_ratio: float = within(BELOW_ONE, 0.0)
    """Share of the data to hold out instead, chosen by the seed."""
    eval_steps: int = within(INTERVAL, -1)
    """Evaluate so often, also before the first step and at the end; -1: at the end only; 0: never.
    A number needs held-out data."""
    eval_answers: int = within(NOT_NEGATIVE, 10)
    """Held-out questions that are answered by generation each time."""
    eval_max_new_tokens: int = within(POSITIVE, 64)
    """Most tokens of such an answer."""
    text_probe: list[str | dict[str, Any]] = field(default_factory=list)
    """Texts whose loss shows what is forgotten (default: the held-out samples without media)."""

    save_steps: int = within(POSITIVE, 1000)
    """Steps from one checkpoint to the next; the end is always saved."""
    save_total_limit: int = within(POSITIVE, 10)
    """Checkpoints that are kept, the latest ones; the last two with their optimiser state."""
    max_hours: float | None = within(POSITIVE, None)
    """Save and end once the run has taken this long; the same command goes on."""
    logging_steps: int = within(POSITIVE, 5)
    """Steps from one line of figures to the next."""
    report_to: list[Literal["tensorboard", "wandb", "swanlab"]] = field(default_factory=list)
    """Trackers beside `log.jsonl`."""
    run_name: str | None = None
    """As trackers show it (default: the name of output_dir)."""
    seed: int = within(SEED, 42)
    """Of the order of the data and of all else that is drawn at random; fixed for a run."""

    dry_run: bool = False
    """Show the plan, the cost, the memory and the first sample, run the costliest micro-batch once,
    and end."""
    profile: bool = False
    """Trace three steps with torch's profiler, into `profile/` of the run."""

    def __post_init__(self) -> None:
        for option in fields(self):
            value, allowed = getattr(self, option.name), option.metadata.get("allowed")
            if allowed and value is not None and not allowed.holds(value):
                says = "finite" if value == inf else allowed.says
                raise UsageError(f"{option.name} is {value}; it must be {says}")
        try:
            Limits.of(self)
        except ValueError as error:
            raise UsageError(str(error)) from None
        if wrong := next(self._contradictions(), None):
            raise UsageError(wrong)

    def _contradictions(self) -> Iterator[str]:
        """What is wrong with options that go well alone."""
        if self.feature_cache and self.deterministic:
            yield (
                "feature_cache keeps rows computed beside other images, which may round otherwise; "
                "leave it or deterministic out"
            )
        if self.streaming and self.max_steps is None:
            yield "streaming needs max_steps, since the length of an epoch is unknown"
        if self.val_dataset and self.split_dataset_ratio:
            yield "give val_dataset or split_dataset_ratio, not both"
        if self.streaming and self.split_dataset_ratio:
            yield "split_dataset_ratio needs an index; with streaming, give val_dataset"
        held_out = self.val_dataset or self.split_dataset_ratio or self.text_probe
        if self.eval_steps > 0 and not held_out:
            yield "eval_steps needs val_dataset, split_dataset_ratio or text_probe"
        if self.auto_budget and self.plan != "packed":
            yield f"auto_budget needs plan: packed; {self.plan} has no budgets"
        fixed = self.plan == "packed" and not self.auto_budget
        if fixed and self.max_length > self.token_budget:
            yield (
                f"max_length {self.max_length} is above token_budget {self.token_budget}; a "
                "micro-batch must hold any sample"
            )
        frozen = self.freeze_vit and self.freeze_aligner and self.freeze_llm
        last = self.last_vit_layers or self.last_llm_layers
        if frozen and not (last or self.trainable_parameters):
            yield "freeze_vit, freeze_aligner and freeze_llm leave nothing to train"

    @property
    def budget(self) -> Budget:
        """Of a micro-batch."""
        samples = self.per_device_train_batch_size
        return Budget(self.plan, samples, self.token_budget, self.patch_budget)

    @property
    def recompute(self) -> tuple[Policy, Policy]:
        """Of the ViT and of the language model."""
        llm, vit = self.gradient_checkpointing, self.vit_gradient_checkpointing
        return _policy(llm if vit is None else vit), _policy(llm)

    def to_yaml(self) -> str:
        """The resolved config, loadable with --config."""
        plain = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items()}
        return yaml.safe_dump(plain, sort_keys=False)


def _policy(asked: bool | Policy) -> Policy:
    return {True: "full", False: "none"}.get(asked, asked)

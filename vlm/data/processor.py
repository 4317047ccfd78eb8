"""Sample -> Example: tokens, targets, positions and pixels; the same in training and in chat."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import torch
from tokenizers import Tokenizer
from torch import Tensor

from vlm.batch import Features
from vlm.checkpoint import CheckpointError
from vlm.config import VLMConfig
from vlm.data.chat import DEFAULT_SYSTEM, Span, Think, render, render_prompt
from vlm.data.grounding import place_boxes
from vlm.data.limits import Limits
from vlm.data.media import TAGS, Grid, MediaReader, Medium
from vlm.data.schema import IMAGE_TAG, VIDEO_TAG, BadSample, Sample
from vlm.hf_config import read_config, read_json
from vlm.model_files import MEDIA_TOKENS, check_settings, check_tokenizer
from vlm.rope import mrope_positions

if TYPE_CHECKING:
    from vlm.data.features import FeatureCache

IGNORED = -100
Truncation = Literal["delete", "left", "right"]


@dataclass(frozen=True)
class Example:
    """One sample as the model sees it. Legend: t tokens, P patches, i images and videos."""

    id: str
    input_ids: Tensor
    """(t,) int64."""
    targets: Tensor
    """(t,) int64: the next token where it is learnt, else -100."""
    weights: Tensor | None
    """(t,) float32: weight of each target; None where all are 1."""
    position_ids: Tensor
    """(3, t) int64."""
    patches: Tensor
    """(P, patch_dim) uint8, of the media that are not in `features`."""
    grid_thw: tuple[Grid, ...]
    """(time, height, width) in patches of each image and video, in order of appearance."""
    second_per_grid: tuple[float, ...] = ()
    """Seconds from one temporal patch to the next, one per video."""
    features: Features | None = None
    """Of media that a cache knows; None without one."""

    @property
    def length(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class Sizes:
    """What a sample will take, without decoding a pixel."""

    length: int
    targets: int
    grid_thw: tuple[Grid, ...]


class Processor:
    """Turns samples into examples by a model's own tokenizer and settings."""

    def __init__(
        self,
        config: VLMConfig,
        tokenizer: Tokenizer,
        stop_ids: tuple[int, ...],
        limits: Limits = Limits(),  # noqa: B008 - frozen
        *,
        max_length: int | None = None,
        truncation: Truncation = "delete",
        default_system: str = DEFAULT_SYSTEM,
        think: Think = "keep",
    ) -> None:
        for name, value, choices in (
            ("truncation", truncation, get_args(Truncation)),
            ("think", think, get_args(Think)),
        ):
            if value not in choices:
                raise ValueError(f"{name} {value!r} is not one of {choices}")
        tokenizer.no_truncation()  # what tokenizer.json may say of lengths is not ours
        tokenizer.no_padding()
        self.config, self.tokenizer, self.stop_ids = config, tokenizer, stop_ids
        self.limits, self.reader = limits, MediaReader(config.vision, limits)
        self.max_length, self.truncation = max_length, truncation
        self.default_system, self.think = default_system, think
        ids = (config.vision_start_token_id, config.vision_end_token_id)
        ids += (config.image_token_id, config.video_token_id)
        self._media_ids = frozenset(ids)
        self._media_tokens = [*MEDIA_TOKENS, "<|vision_pad|>"]

    @classmethod
    def from_pretrained(
        cls,
        model_dir: Path | str,
        limits: Limits = Limits(),  # noqa: B008 - frozen
        **options,
    ) -> "Processor":
        """The processor of a checkpoint directory; options as in the constructor.

        Raises:
            ConfigError, CheckpointError: files that are missing or do not fit.
        """
        folder = Path(model_dir)
        path = folder / "tokenizer.json"
        if not path.exists():
            runs = [*folder.glob("model"), *folder.glob("checkpoint-*/model")]
            meant = f"; did you mean {max(runs, key=lambda p: p.stat().st_mtime)}?" if runs else ""
            raise CheckpointError(f"{path} does not exist; the model needs its tokenizer{meant}")
        config, tokenizer = read_config(folder), Tokenizer.from_file(str(path))
        check_tokenizer(path, tokenizer, config)
        check_settings(folder, config)
        stop_ids = _stop_ids(folder, tokenizer)
        return cls(config, tokenizer, stop_ids, limits, **options)

    def encode(self, sample: Sample, cache: "FeatureCache | None" = None) -> Example:
        """A training example, of the sizes that `measure` tells.

        Args:
            cache: of a frozen tower's output; media that it knows are not decoded.

        Raises:
            BadSample: nothing can be learnt from it, or a video holds less than its header tells.
        """
        example = self._example(sample, self._training_spans, exact=True, cache=cache)
        if not (example.targets != IGNORED).any():
            raise BadSample(sample.id, "has nothing to learn")
        return example

    def prompt(self, sample: Sample, answer_prefix: str = "") -> Example:
        """The conversation up to the assistant's next words; nothing is learnt.

        Args:
            answer_prefix: words that the answer begins with, which are not generated.
        """

        def spans(placed: Sample) -> list[Span]:
            return render_prompt(placed, self.default_system, answer_prefix, self.think)

        return self._example(sample, spans)

    def measure(self, sample: Sample) -> Sizes:
        """Sizes of `encode(sample)` from the headers of its media; raises as it does."""
        media = self.reader.measure(sample)
        ids, targets, _ = self._tokens(sample, self._training_spans, media)
        count = sum(target != IGNORED for target in targets)
        if not count:
            raise BadSample(sample.id, "has nothing to learn")
        return Sizes(len(ids), count, tuple(medium.grid for medium in media))

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def _training_spans(self, sample: Sample) -> list[Span]:
        return render(sample, self.default_system, self.think)

    def _example(
        self,
        sample: Sample,
        spans: Callable[[Sample], list[Span]],
        exact: bool = False,
        cache: "FeatureCache | None" = None,
    ) -> Example:
        media, patches, features = self.reader.read(sample, exact, cache)
        ids, targets, weights = self._tokens(sample, spans, media)
        input_ids = torch.tensor(ids)
        uneven = any(w != 1.0 for w, target in zip(weights, targets, strict=True) if target >= 0)
        grids = tuple(medium.grid for medium in media)
        seconds = tuple(medium.seconds for medium in media if medium.seconds is not None)
        return Example(
            id=sample.id,
            input_ids=input_ids,
            targets=torch.tensor(targets),
            weights=torch.tensor(weights) if uneven else None,
            position_ids=mrope_positions(input_ids, grids, self.config, seconds),
            patches=patches,
            grid_thw=grids,
            second_per_grid=seconds,
            features=features,
        )

    def _tokens(
        self, sample: Sample, spans: Callable[[Sample], list[Span]], media: list[Medium]
    ) -> tuple[list[int], list[int], list[float]]:
        """Ids, shifted targets and their weights, truncated."""
        start, end = self.config.vision_start_token_id, self.config.vision_end_token_id
        ids, weights = [], []
        remaining = iter(media)
        for span in spans(place_boxes(sample, media, self.config.vision.patch_size)):
            for number, text in enumerate(TAGS.split(span.text)):
                if number:
                    medium = next(remaining, None)
                    if medium is None:
                        raise BadSample(sample.id, "has a tag of which two messages hold a half")
                    block = [start, *self._placeholders(medium), end]
                    ids += block
                    weights += [0.0] * len(block)
                for token in self._media_tokens:
                    if token in text:
                        raise BadSample(
                            sample.id, f"has {token} in its text; use {IMAGE_TAG} or {VIDEO_TAG}"
                        )
                pieces = self.tokenizer.encode(text, add_special_tokens=False).ids
                ids += pieces
                weights += [span.weight] * len(pieces)
        ids, weights = self._truncate(sample, ids, weights)
        learnt = zip(ids[1:], weights[1:], strict=True)
        targets = [index if weight else IGNORED for index, weight in learnt]
        return ids, [*targets, IGNORED], [*weights[1:], 0.0]

    def _placeholders(self, medium: Medium) -> list[int]:
        """One token per visual token."""
        t, h, w = medium.grid
        is_image = medium.info is None
        token = self.config.image_token_id if is_image else self.config.video_token_id
        return [token] * (t * h * w // self.config.vision.merge_unit)

    def _truncate(
        self, sample: Sample, ids: list[int], weights: list[float]
    ) -> tuple[list[int], list[float]]:
        """At most `max_length` tokens: text alone is cut, never an image or video."""
        excess = len(ids) - (self.max_length or len(ids))
        if excess <= 0:
            return ids, weights
        limit = f"has {len(ids)} tokens, more than max_length {self.max_length}"
        if self.truncation == "delete":
            raise BadSample(sample.id, limit)
        text = [row for row, index in enumerate(ids) if index not in self._media_ids]
        if len(text) < excess:
            raise BadSample(sample.id, f"{limit}, even without its text")
        cut = set(text[:excess] if self.truncation == "left" else text[len(text) - excess :])
        kept = [row for row in range(len(ids)) if row not in cut]
        return [ids[row] for row in kept], [weights[row] for row in kept]


def _stop_ids(folder: Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The generation config's end tokens; the end of a turn where there is none."""
    path = folder / "generation_config.json"
    ends = read_json(path).get("eos_token_id") if path.exists() else None
    if ends is None:
        ends = tokenizer.token_to_id("<|im_end|>")
    return tuple(ends) if isinstance(ends, list) else (ends,)

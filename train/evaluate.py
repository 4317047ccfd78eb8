"""Evaluation while training: losses on held-out samples, and a few answers.

Does the model look? The loss of samples with images is taken three times: with their own, with
another sample's in their place, and with blank ones. Tokens, grids and positions are the same in
all three, so a model that looks does best with its own. A video counts as an image here.

Nothing of training changes by it: no random number is drawn from torch's generators, no graph is
made, and the model is left in the mode that it was in.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from operator import itemgetter
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from train.answers import Question, add_answers, answer, ask
from train.config import TrainConfig
from train.data import TrainData
from train.metrics import Log
from train.state import Run
from train.world import World
from vlm.config import VisionConfig
from vlm.data.collate import collate
from vlm.data.image import patchify, resize
from vlm.data.index import Index
from vlm.data.ledger import EVALUATION, Entry
from vlm.data.pack import arrange
from vlm.data.processor import Example, Processor
from vlm.data.schema import BadSample, Sample
from vlm.data.split import related, strangers
from vlm.data.view import pictures
from vlm.loss import cross_entropy
from vlm.model import VisionLanguageModel

BLANK = 127
"""Level of a blank image: grey, near the mean that pixels are normalised by."""
SHARED = 1024
"""Samples that are spread over the ranks at once."""
TRUE, SHUFFLED, BLANKED, TARGETS, RIGHT = range(5)
"""Rows of sums: losses with each kind of image, then counts with the true ones."""

T = TypeVar("T")


class Evaluator:
    """Losses and answers on a run's held-out samples; all ranks share the work."""

    def __init__(
        self, config: TrainConfig, world: World, processor: Processor, data: TrainData, run: Run
    ) -> None:
        self.config, self.world, self.processor = config, world, processor
        self.held_out, self.probe, self.ledger = data.held_out, data.text_probe, data.ledger
        self.answers, self.start = run.dir / "answers.jsonl", data.progress.step
        self.bad: list[Entry] = []
        """Found by this rank since it last told."""
        if self.held_out is not None:
            self.texts = self.held_out.select(np.flatnonzero(self.held_out.media == 0))
            self.looking = self.held_out.select(np.flatnonzero(self.held_out.media))
            samples = map(self.looking.sample, range(len(self.looking)))
            self.others = strangers(related(samples))

    def due(self, step: int, last: bool = False) -> bool:
        """Whether to evaluate once `step` steps are done. Where a run resumes it has been done."""
        every = self.config.eval_steps
        nothing = self.held_out is None and self.probe is None
        if every == 0 or nothing or 0 < step == self.start:
            return False
        return last or (every > 0 and step % every == 0)

    def at(self, step: int, model: VisionLanguageModel, log: Log, last: bool = False) -> None:
        """Evaluate where it is `due`, and log the figures; every rank calls this."""
        if self.due(step, last):
            log.eval(step, self(model, step))

    @torch.no_grad()
    def __call__(self, model: VisionLanguageModel, step: int) -> dict[str, object]:
        """The figures for the log; every rank calls this.

        Of the held-out samples: `n`; `loss`, `token_accuracy` and `loss_by_source` over all their
        targets; `loss_true`, `loss_shuffled` and `loss_blank` over those of samples with images.
        `text_loss` is the text probe's, or that of the held-out samples without images. What there
        is no sample for is left out. The answers are added to `answers.jsonl`.
        """
        began = time.perf_counter()
        training = model.training
        model.eval()
        figures: dict[str, object] = {}
        if self.held_out is not None:
            figures = self._losses(model)
            answers = self.world.gather(self._answers(model, step))
            answers = [figures for _, figures in sorted(answers, key=itemgetter(0))]
            self.world.from_first(lambda: add_answers(self.answers, answers, step))
        if self.probe is not None:
            figures["text_loss"] = _mean(self._sums(model, self.probe), TRUE)
        self.ledger.record(self.world.gather(self.bad))
        self.bad = []
        model.train(training)
        return figures | {"seconds": round(time.perf_counter() - began, 3)}

    def _losses(self, model: VisionLanguageModel) -> dict[str, object]:
        looking = self._sums(model, self.looking, self.others)
        texts = self._sums(model, self.texts)
        both, sources = looking + texts, [source.name for source in self.held_out.sources]
        bad = {entry.id for entry in self.world.gather(self.bad)}
        figures: dict[str, object] = {"n": len(self.held_out) - len(bad)}
        if both[TARGETS].any():
            figures["loss"], figures["token_accuracy"] = _mean(both, TRUE), _mean(both, RIGHT)
            figures["loss_by_source"] = {
                name: _mean(both[:, [number]], TRUE)
                for number, name in enumerate(sources)
                if both[TARGETS, number]
            }
        if looking[SHUFFLED].any():
            for name, row in (("true", TRUE), ("shuffled", SHUFFLED), ("blank", BLANKED)):
                figures[f"loss_{name}"] = _mean(looking, row)
        if texts[TARGETS].any():
            figures["text_loss"] = _mean(texts, TRUE)
        return figures

    def _sums(
        self, model: VisionLanguageModel, index: Index, others: np.ndarray | None = None
    ) -> np.ndarray:
        """(5, sources) float64: rows TRUE to RIGHT, over the targets of each source on all ranks.

        Args:
            others: (n,) for each sample the one whose images are shown in place of its own; where
                empty or None, only the true ones are.
        """
        sums = torch.zeros(RIGHT + 1, len(index.sources), dtype=torch.float64)
        sums = sums.to(self.world.device)
        for numbers in self._mine(index):
            found = [(n, e) for n in numbers if (e := self._read(index, n))]
            if not found:
                continue
            sources = [int(index.source[number]) for number, _ in found]
            batch = collate([example for _, example in found], self.processor.config, sources)
            guises = [batch]
            if others is not None and len(others):
                foreign = [self._foreign(index, others[number], e) for number, e in found]
                guises.append(replace(batch, patches=torch.cat(foreign)))
                guises.append(replace(batch, patches=torch.full_like(batch.patches, BLANK)))
            for row, guise in enumerate(guises):
                guise = guise.to(self.world.device)
                # a head that needs no gradient: the loss would make one in its forward pass
                head = model.head_weight.detach()
                loss = cross_entropy(model(guise), head, guise.targets, guise.weights)
                sums[row].index_add_(0, guise.sources, loss.terms.double())
                if row == TRUE:
                    sums[TARGETS].index_add_(0, guise.sources, torch.ones_like(loss.terms.double()))
                    sums[RIGHT].index_add_(0, guise.sources, loss.right.double())
        return np.reshape(self.world.sum(sums.flatten().tolist()), sums.shape)

    def _mine(self, index: Index) -> Iterator[np.ndarray]:
        """Numbers of this rank's samples, a micro-batch at a time."""
        for first in range(0, len(index), SHARED):
            some = index.select(np.arange(first, min(first + SHARED, len(index))))
            costs = some.costs(self.processor.config, ())
            columns = (costs, some.length, some.patches)
            ranks = arrange(*columns, self.world.size, self.config.budget)
            for micro_batch in ranks[self.world.rank]:
                yield first + np.array(micro_batch, np.int64)

    def _read(self, index: Index, number: int) -> Example | None:
        return self._try(self.processor.encode, index, number)

    def _try(self, work: Callable[[Sample], T], index: Index, number: int) -> T | None:
        """What is made of a sample; None of a bad one, which is remembered."""
        try:
            return work(index.sample(number))
        except BadSample as error:
            self.bad.append(Entry(error.sample_id, error.reason, EVALUATION))
            return None

    def _foreign(self, index: Index, number: int, example: Example) -> Tensor:
        """Patches of the numbered sample's images, as large as the example's own; blank ones where
        that sample is bad."""
        other = self._read(index, number)
        if other is None:
            return torch.full_like(example.patches, BLANK)
        return in_place_of(example, other, self.processor.config.vision)

    def _answers(self, model: VisionLanguageModel, step: int) -> list[tuple[int, dict]]:
        """This rank's share of the questions, which are evenly spread over the held-out samples;
        each with its number."""
        most = min(self.config.eval_answers, len(self.held_out))
        numbers = np.linspace(0, len(self.held_out) - 1, most).astype(np.int64)
        index, answers = self.held_out.select(numbers), []
        for micro_batch in self._mine(index):
            asked = [(n, q) for n in micro_batch if (q := self._try(self._ask, index, n))]
            questions = [question for _, question in asked]
            said = answer(model, questions, self.processor, self.config.eval_max_new_tokens)
            for (number, _), figures in zip(asked, said, strict=True):
                answers.append((int(number), {"step": step} | figures))
        return answers

    def _ask(self, sample: Sample) -> Question:
        return ask(sample, self.processor)


def in_place_of(example: Example, other: Example, vision: VisionConfig) -> Tensor:
    """(P, patch_dim) uint8: another sample's images and videos, each resized to one of the
    example's, over and over where they are fewer; so are a video's frames."""
    shown, parts = pictures(other, vision), []
    for number, (t, h, w) in enumerate(example.grid_thw):
        frames = shown[number % len(shown)]
        size = (h * vision.patch_size, w * vision.patch_size)
        resized = [resize(frames[time % len(frames)], *size) for time in range(t)]
        pixels = torch.stack(resized).repeat_interleave(vision.temporal_patch_size, dim=0)
        parts.append(patchify(pixels, vision))
    return torch.cat(parts)


def _mean(sums: np.ndarray, row: int) -> float:
    """Over the targets of all its sources."""
    return float(sums[row].sum() / sums[TARGETS].sum())

"""Answers from a checkpoint on this machine, by our own generation with a KV cache."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

import torch

from serve.conversation import NO_THOUGHT, THINK, Answer, Sampling, without_thoughts
from serve.usage import UsageError
from vlm.checkpoint import load_model
from vlm.data.collate import collate
from vlm.data.limits import Limits
from vlm.data.processor import Example, Processor
from vlm.data.schema import BadSample, Message, Sample, check_sample
from vlm.generate import generate

WINDOW = 16
"""Batches whose conversations are sorted by length together."""


class Local:
    """A checkpoint directory as a backend; bfloat16 on a GPU, float32 on a CPU."""

    def __init__(
        self,
        folder: Path,
        limits: Limits = Limits(),  # noqa: B008 - frozen
    ) -> None:
        """
        Args:
            limits: on images and videos.

        Raises:
            ConfigError, CheckpointError: the directory holds no model that can be read.
        """
        self.folder, self.limits = folder, limits
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        self.processor = Processor.from_pretrained(folder, limits)
        self.model = load_model(folder, dtype, self.device).eval()

    def identity(self) -> dict:
        weights = (path.stat().st_mtime for path in self.folder.glob("*.safetensors"))
        return {
            "model": str(self.folder.resolve()),
            "weights_modified": max(weights),
            "limits": asdict(self.limits),
        }

    def check_thinking(self) -> None:
        """UsageError where thinking cannot be switched."""
        if self.processor.tokenizer.token_to_id(THINK) is None:
            raise UsageError(
                f"the tokenizer of {self.folder} has no {THINK} token, so thinking cannot be "
                "switched; use --thinking auto"
            )

    def prompt(self, conversation: Sample, thinking: bool | None) -> Example:
        """What the model reads before its answer; BadSample if that cannot be made."""
        conversation = without_thoughts(check_sample(conversation))
        prefix = NO_THOUGHT if thinking is False else ""
        return self.processor.prompt(conversation, prefix)

    def ask(
        self, conversation: Sample, sampling: Sampling, show: Callable[[str], object]
    ) -> Answer:
        shown, ids = "", []

        def on_token(_sample: int, token: int) -> None:
            nonlocal shown
            ids.append(token)
            text = self.processor.decode(ids)
            if not text.endswith("\ufffd"):  # half of a character: wait for the rest
                show(text[len(shown) :])
                shown = text

        example = self.prompt(conversation, sampling.thinking)
        (answer,) = self._generate([example], sampling, on_token)
        show(answer.text[len(shown) :])
        return answer

    def ask_many(
        self, conversations: Iterable[Sample], sampling: Sampling, batch_size: int
    ) -> Iterator[tuple[str, Answer | BadSample]]:
        """Neighbours in length share a batch. When sampling, an answer depends on its batch."""
        source = iter(conversations)
        while window := list(islice(source, WINDOW * batch_size)):
            sized = []
            for conversation in window:
                try:
                    sized.append((self._length(conversation), conversation))
                except BadSample as error:
                    yield conversation.id, error
            sized.sort(key=lambda pair: pair[0])
            for start in range(0, len(sized), batch_size):
                examples = []
                for _, conversation in sized[start : start + batch_size]:
                    try:
                        examples.append(self.prompt(conversation, sampling.thinking))
                    except BadSample as error:  # damaged behind its header
                        yield conversation.id, error
                if examples:
                    answers = self._generate(examples, sampling)
                    yield from zip((e.id for e in examples), answers, strict=True)

    def _length(self, conversation: Sample) -> int:
        """Tokens with an empty answer, without decoding a pixel."""
        ended = (*conversation.messages, Message("assistant", ""))
        return self.processor.measure(replace(conversation, messages=ended)).length

    def _generate(self, examples: list[Example], sampling: Sampling, on_token=None) -> list[Answer]:
        outputs = generate(
            self.model,
            collate(examples, self.model.config).to(self.device),
            max_new_tokens=sampling.max_new_tokens,
            stop_ids=self.processor.stop_ids,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed,
            on_token=on_token,
        )
        return [
            Answer(
                self.processor.decode(ids),
                "stop" if len(ids) < sampling.max_new_tokens else "length",
            )
            for ids in outputs
        ]

"""Chat with a checkpoint in the terminal, by our own KV-cache generation.

    python serve/chat.py DIR --image cat.jpg --prompt "What is this?"     # one answer, streamed
    python serve/chat.py DIR                                              # a conversation

In a conversation `/image PATH` adds an image to the next message, `/reset` starts anew and
`/quit` ends. Exit code 2 is a mistake in what was asked for, told in one sentence.
"""

import argparse
import sys
from pathlib import Path

import torch

from vlm.checkpoint import CheckpointError, load_model
from vlm.data.chat import DEFAULT_SYSTEM
from vlm.data.collate import collate
from vlm.data.processor import Processor
from vlm.data.schema import IMAGE_TAG, BadSample, Message, Sample, check_sample
from vlm.generate import generate
from vlm.hf_config import ConfigError


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python serve/chat.py", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", type=Path, help="directory of a checkpoint")
    parser.add_argument("--prompt", help="ask this once and end")
    parser.add_argument("--image", type=Path, action="append", default=[], help="may be repeated")
    parser.add_argument("--system", default=DEFAULT_SYSTEM, help="system prompt; empty for none")
    parser.add_argument("--max_new_tokens", type=int, default=512)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


class Chat:
    """A conversation with its images, and the model that answers."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        self.processor = Processor.from_pretrained(options.model, default_system=options.system)
        self.model = load_model(options.model, dtype, self.device).eval()
        self.reset()

    def reset(self) -> None:
        self.messages: list[Message] = []
        self.images: list[Path] = []

    def ask(self, text: str, images: list[Path]) -> str:
        """Stream the answer to the terminal and remember both; BadSample names a bad image."""
        question = Message("user", IMAGE_TAG * len(images) + text)
        messages, all_images = (*self.messages, question), (*self.images, *images)
        sample = check_sample(Sample("chat", messages, all_images))
        batch = collate([self.processor.prompt(sample)], self.model.config).to(self.device)
        shown, ids = "", []

        def show(_sample: int, token: int) -> None:
            nonlocal shown
            ids.append(token)
            whole = self.processor.decode(ids)
            if not whole.endswith("\ufffd"):  # half of a character: wait for the rest
                print(whole[len(shown) :], end="", flush=True)
                shown = whole

        generate(
            self.model,
            batch,
            max_new_tokens=self.options.max_new_tokens,
            stop_ids=self.processor.stop_ids,
            temperature=self.options.temperature,
            top_p=self.options.top_p,
            seed=self.options.seed,
            on_token=show,
        )
        print(flush=True)
        answer = self.processor.decode(ids)
        self.messages, self.images = [*messages, Message("assistant", answer)], [*all_images]
        return answer


def converse(chat: Chat, images: list[Path]) -> None:
    """Read messages until /quit or the end of the input."""
    print("/image PATH adds an image, /reset starts anew, /quit ends")
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line == "/quit":
            return
        if line == "/reset":
            chat.reset()
            images = []
        elif line.startswith("/image"):
            path = Path(line.removeprefix("/image").strip())
            if path.is_file():
                images = [*images, path]
            else:
                print(f"{path} does not exist")
        elif line.startswith("/"):
            print(f"{line.split()[0]} is no command; use /image PATH, /reset or /quit")
        elif line:
            try:
                chat.ask(line, images)
            except BadSample as error:
                print(error.reason)
            images = []


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        chat = Chat(options)
        if options.prompt is None:
            converse(chat, options.image)
        else:
            chat.ask(options.prompt, options.image)
    except BadSample as error:
        print(f"error: {error.reason}", file=sys.stderr)
        return 2
    except (ConfigError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

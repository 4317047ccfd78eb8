"""A conversation in the terminal: what is typed, what is printed, what is remembered."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import TextIO

from serve.conversation import (
    THINK,
    THINK_END,
    Answer,
    Backend,
    EndpointError,
    Sampling,
    check_image,
    check_video,
    question,
    reply,
)
from vlm.data.schema import BadSample, Media, Message, Sample

HELP = """\
/image PATH   add an image to the next message; <image> in the message places it
/video PATH   add a video; <video> places it
/system TEXT  set the system prompt and start anew
/reset        start anew
/save PATH    add the conversation to a JSONL file, as training reads it
/help         show this
/quit         end (or Ctrl-D); Ctrl-C stops an answer"""
DIM, PLAIN = "\033[2m", "\033[0m"


class Printer:
    """Prints an answer as it comes; on a terminal what is between <think> and </think> is dim."""

    def __init__(self, out: TextIO) -> None:
        self.out, self.styled = out, out.isatty()
        self.held, self.thinking, self.begun = "", False, False

    def write(self, text: str) -> None:
        self.held += text
        self.begun = True
        while self.styled and self._tag in self.held:
            before, _, self.held = self.held.partition(self._tag)
            words = f"{before}{THINK_END}{PLAIN}" if self.thinking else f"{before}{DIM}{THINK}"
            self.out.write(words)
            self.thinking = not self.thinking
        sizes = range(len(self._tag) - 1, 0, -1) if self.styled else ()
        begun = next((size for size in sizes if self.held.endswith(self._tag[:size])), 0)
        end = len(self.held) - begun  # wait for the rest of what may become a tag
        ready, self.held = self.held[:end], self.held[end:]  # first: Ctrl-C may come any time
        self.out.write(ready)
        self.out.flush()

    def end(self) -> None:
        self.out.write(self.held + PLAIN * self.thinking + "\n")
        self.out.flush()
        self.held, self.thinking, self.begun = "", False, False

    def break_off(self) -> None:
        """End a line that was begun."""
        if self.begun:
            self.end()

    @property
    def _tag(self) -> str:
        return THINK_END if self.thinking else THINK


class Chat:
    """A conversation, what is added to its next message, and who answers."""

    def __init__(self, backend: Backend, sampling: Sampling, system: str | None = None) -> None:
        self.backend, self.sampling, self.system = backend, sampling, system
        self.reset()

    def reset(self) -> None:
        messages = () if self.system is None else (Message("system", self.system),)
        self.conversation = Sample("chat", messages)
        self.images: list[Media] = []
        self.videos: list[Media] = []

    def ask(self, text: str, printer: Printer) -> Answer:
        """Print the answer and remember it. What raises or is stopped leaves no trace."""
        images, videos, self.images, self.videos = self.images, self.videos, [], []
        before = self.conversation
        asked = replace(
            before,
            messages=(*before.messages, question(text, len(images), len(videos))),
            images=(*before.images, *images),
            videos=(*before.videos, *videos),
        )
        try:
            answer = self.backend.ask(asked, self.sampling, printer.write)
        except BaseException:
            printer.break_off()
            raise
        printer.end()
        self.conversation = replace(asked, messages=(*asked.messages, reply(answer.text)))
        return answer

    def save(self, path: Path) -> None:
        """Add the conversation to a JSONL file, one line in the format that training reads."""
        row = {
            "messages": [{"role": m.role, "content": m.content} for m in self.conversation.messages]
        }
        for kind in ("images", "videos"):
            if media := getattr(self.conversation, kind):
                row[kind] = [str(item.resolve()) for item in media]
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def converse(chat: Chat, printer: Printer) -> None:
    """Read messages and commands until /quit or the end of the input."""
    print("/help shows the commands", flush=True)
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n/quit ends")
            continue
        except UnicodeDecodeError as error:
            print(f"that line is not UTF-8 ({error})")
            continue
        if line == "/quit":
            return
        try:
            if line.startswith("/"):
                command, _, rest = line.partition(" ")
                print(obey(chat, command, rest.strip()), flush=True)
            elif line:
                answer = chat.ask(line, printer)
                if answer.finish == "length":
                    print("(cut off at max_new_tokens)", flush=True)
        except KeyboardInterrupt:
            print("(stopped; question and answer are not part of the conversation)", flush=True)
        except BadSample as error:
            print(f"{error.reason} (the message is not part of the conversation)", flush=True)
        except EndpointError as error:
            print(f"{error} (the message is not part of the conversation)", flush=True)


def obey(chat: Chat, command: str, rest: str) -> str:
    """Carry out a command; what to say of it."""
    path = Path(os.path.expanduser(rest.strip("'\"")))
    try:
        if command == "/image":
            check_image(path)
            chat.images.append(path)
            return f"{path} goes with the next message"
        if command == "/video":
            check_video(path)
            chat.videos.append(path)
            return f"{path} goes with the next message"
        if command == "/system":
            chat.system = rest
            chat.reset()
            return "a new conversation with this system prompt"
        if command == "/reset":
            chat.reset()
            return "a new conversation"
        if command == "/save":
            if len(chat.conversation.messages) < 2:
                return "there is nothing to save yet"
            chat.save(path)
            return f"added to {path}"
        if command == "/help":
            return HELP
    except BadSample as error:
        return error.reason
    except OSError as error:
        return f"{path} cannot be written ({error.strerror})"
    return f"{command} is no command; /help shows them"

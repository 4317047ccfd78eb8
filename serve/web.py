"""A web page to chat with an OpenAI-compatible endpoint, with images and videos, streamed.

    python serve/web.py http://localhost:8000 --port 7860

Only this machine can open the page unless `--host 0.0.0.0` is given; nothing is reported anywhere,
and uploads are deleted when the server ends. The page shows a `Sample`, which it keeps per visitor.
"""

import argparse
import asyncio
import mimetypes
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import gradio as gr

from serve.api_key import API_KEY, hide_api_key
from serve.conversation import (
    THINK,
    THINK_END,
    EndpointError,
    Sampling,
    check_image,
    check_video,
    question,
    reply,
)
from serve.endpoint import Endpoint
from serve.request import TAG
from serve.usage import UsageError
from vlm.data.schema import BadSample, Message, Sample, check_sample

THINKING = {"auto": None, "on": True, "off": False}
EMPTY = Sample("page", ())


def responder(endpoint: Endpoint) -> Callable[..., AsyncIterator[tuple]]:
    """What the page does with a message."""

    async def respond(
        message: dict,
        conversation: Sample,
        system: str,
        thinking: str,
        temperature: float,
        max_new_tokens: int,
    ) -> AsyncIterator[tuple[list, Sample, dict | None, str]]:
        """(shown, conversation, text box, notice) as the answer grows.

        Where there is no answer, the notice says why, and the message is back in the text box.
        """
        notice = ""
        try:
            asked = add_message(conversation, message)
            yield display(asked), conversation, None, notice
            with_system = (Message("system", system), *asked.messages) if system else asked.messages
            sampling = Sampling(int(max_new_tokens or 0), temperature, thinking=THINKING[thinking])
            stream = endpoint.stream(replace(asked, messages=with_system), sampling)
            # in a thread, so that Stop need not wait for a silent server
            while answer := await asyncio.to_thread(next, stream, None):
                answered = replace(asked, messages=(*asked.messages, reply(answer.text)))
                notice = "The answer was cut off at max_new_tokens." * (answer.finish == "length")
                yield display(answered), conversation, None, notice
            yield display(answered), answered, None, notice
        except (EndpointError, UsageError) as error:
            yield display(conversation), conversation, message, f"**Error:** {error}"
        except BadSample as error:
            yield display(conversation), conversation, message, f"**Error:** {error.reason}"

    return respond


def add_message(conversation: Sample, message: dict) -> Sample:
    """The conversation and a message of the text box, with its uploads."""
    images, videos = [], []
    for path in map(Path, message["files"]):
        if (mimetypes.guess_type(path.name)[0] or "").startswith("video/"):
            check_video(path)
            videos.append(path)
        else:
            check_image(path)
            images.append(path)
    turn = question(message["text"], len(images), len(videos))
    if not turn.content.strip():
        raise UsageError("The message is empty.")
    asked = replace(
        conversation,
        messages=(*conversation.messages, turn),
        images=(*conversation.images, *images),
        videos=(*conversation.videos, *videos),
    )
    return check_sample(asked)


def display(conversation: Sample) -> list[dict]:
    """The conversation as gradio shows it: media stand before the text of their turn."""
    media = {"<image>": iter(conversation.images), "<video>": iter(conversation.videos)}
    shown = []
    for turn in conversation.messages:
        files = [{"path": str(next(media[tag]))} for tag in TAG.findall(turn.content)]
        text = TAG.sub("", turn.content)
        shown.append({"role": turn.role, "content": [*files, *filter(None, [text])]})
    return shown


def build_page(endpoint: Endpoint) -> gr.Blocks:
    with gr.Blocks(title="GraftVL", analytics_enabled=False, fill_height=True) as page:
        conversation = gr.State(EMPTY)
        chatbot = gr.Chatbot(
            show_label=False, scale=1, reasoning_tags=[(THINK, THINK_END)], buttons=["copy"]
        )
        notice = gr.Markdown()
        box = gr.MultimodalTextbox(
            file_count="multiple",
            file_types=["image", "video"],
            placeholder="Ask something; add images or a video",
            show_label=False,
            autofocus=True,
        )
        with gr.Row():
            stop, reset = gr.Button("Stop"), gr.Button("New conversation")
        with gr.Accordion("Settings", open=False):
            settings = [
                gr.Textbox(label="System prompt", placeholder="the model's own"),
                gr.Radio(list(THINKING), value="auto", label="Thinking"),
                gr.Slider(0, 2, value=0, step=0.05, label="Temperature (0 is greedy)"),
                gr.Number(Sampling.max_new_tokens, label="max_new_tokens", precision=0),
            ]
        answering = box.submit(
            responder(endpoint),
            [box, conversation, *settings],
            [chatbot, conversation, box, notice],
            concurrency_limit=16,
            api_visibility="private",
        )
        stop.click(display, conversation, chatbot, cancels=answering, api_visibility="private")
        gr.on(
            [reset.click, chatbot.clear],
            lambda: ([], EMPTY, ""),
            outputs=[chatbot, conversation, notice],
            cancels=answering,
            api_visibility="private",
        )
    return page


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python serve/web.py", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("url", help="a server, with or without /v1")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--api_key", help="default: OPENAI_API_KEY")
    parser.add_argument("--model_name", help="default: the one that the server has")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the folder is deleted
    with tempfile.TemporaryDirectory(prefix="graftvl-web-") as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads
        try:
            endpoint = Endpoint(options.url, options.api_key, options.model_name)
            endpoint.identity()  # find out now if nobody is there
            page = build_page(endpoint)
            page.launch(
                quiet=True,  # what gradio would say invites to share the page with everybody
                prevent_thread_lock=True,
                server_name=options.host,
                server_port=options.port,
                share=False,
                footer_links=[],
                css='button[aria-label="Share"] { display: none }',  # it would upload to a hub
                ssr_mode=False,
            )
            print(f"the page is at http://{options.host}:{options.port}, until Ctrl-C", flush=True)
            page.block_thread()
        except (UsageError, EndpointError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            return 130
    return 0


if __name__ == "__main__":
    hide_api_key(API_KEY)
    code = main()
    sys.stdout.flush()
    os._exit(code)  # at once, even if a thread waits for a silent server

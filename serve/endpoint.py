"""Answers from an OpenAI-compatible server, such as vLLM's."""

import os
import queue
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property

import openai

from serve.conversation import THINK, THINK_END, Answer, EndpointError, Sampling
from serve.request import request_messages
from serve.usage import UsageError
from vlm.data.schema import BadSample, Sample

CONNECT_SECONDS = 10


class EndpointDown(EndpointError):
    """No request to this endpoint can succeed until something is changed."""


class Endpoint:
    """A server as a backend."""

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        model: str | None = None,
        timeout: float = 600.0,
    ) -> None:
        """
        Args:
            url: with or without `/v1`.
            api_key: OPENAI_API_KEY from the environment if not given.
            model: the one that the server has, if it has just one.
            timeout: seconds without a sign of life from the server.
        """
        url = url.rstrip("/")
        self.url = url if re.search(r"/v\d+$", url) else f"{url}/v1"
        api_key = api_key or os.environ.get("OPENAI_API_KEY") or "EMPTY"
        if not api_key.isascii():
            raise UsageError("the API key has characters that no HTTP header can hold")
        self.timeout, self._model = timeout, model
        try:
            self.client = openai.OpenAI(
                base_url=self.url,
                api_key=api_key,
                max_retries=1,
                timeout=openai.Timeout(timeout, connect=CONNECT_SECONDS),
            )
        except Exception as error:  # noqa: BLE001 - the HTTP library's own error for a bad URL
            raise UsageError(f"{url} is not a URL that can be used ({error})") from None

    @cached_property
    def model(self) -> str:
        """The name of the model that answers."""
        if self._model:
            return self._model
        with self._explained("models"):
            listed = self.client.models.list()
        names = [entry.id for entry in getattr(listed, "data", None) or []]
        if not names:
            raise EndpointDown(f"{self.url} lists no model; is it an OpenAI-compatible server?")
        if len(names) > 1:
            raise EndpointDown(
                f"{self.url} has {len(names)} models ({', '.join(names[:9])}); "
                "choose with --model_name"
            )
        return names[0]

    def identity(self) -> dict:
        return {"url": self.url, "model": self.model}

    def stream(self, conversation: Sample, sampling: Sampling) -> Iterator[Answer]:
        """The answer so far, again and again; `finish` is empty until the last.

        A thought that the server reports apart from the answer comes in `<think>` tags.

        Raises:
            BadSample: media that cannot be read, or a conversation that the server refuses.
            EndpointError, EndpointDown: everything else that goes wrong, in one sentence.
        """
        messages = request_messages(conversation)
        extra = {}
        if sampling.thinking is not None:
            extra["chat_template_kwargs"] = {"enable_thinking": sampling.thinking}
        text, thinking, finish = "", False, None
        with (
            self._explained(conversation.id),
            self.client.chat.completions.create(
                model=self.model,
                messages=messages,
                stream=True,
                max_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                seed=sampling.seed,
                extra_body=extra,
            ) as chunks,
        ):
            for chunk in chunks:
                if not chunk.choices:
                    continue
                delta, finish = chunk.choices[0].delta, chunk.choices[0].finish_reason
                extras = delta.model_extra or {}
                thought = extras.get("reasoning") or extras.get("reasoning_content") or ""
                if thought and not thinking:
                    text, thinking = f"{text}{THINK}\n", True
                text += thought
                if delta.content and thinking:
                    text, thinking = f"{text}\n{THINK_END}\n\n", False
                text += delta.content or ""
                text = text.encode("utf-8", "replace").decode()  # half of a surrogate pair
                yield Answer(text, finish or "")
                if finish:
                    return
        raise EndpointError(f"{self.url} broke off in the middle of an answer")

    def ask(
        self, conversation: Sample, sampling: Sampling, show: Callable[[str], object]
    ) -> Answer:
        shown = ""
        for answer in self.stream(conversation, sampling):
            show(answer.text[len(shown) :])
            shown = answer.text
        return answer

    def ask_many(
        self, conversations: Iterable[Sample], sampling: Sampling, batch_size: int
    ) -> Iterator[tuple[str, Answer | BadSample]]:
        """`batch_size` requests at a time. EndpointDown where going on is pointless."""
        source, lock, stop = iter(conversations), threading.Lock(), threading.Event()
        done: queue.Queue = queue.Queue()

        def work() -> None:
            try:
                while not stop.is_set():
                    with lock:
                        conversation = next(source, None)
                    if conversation is None:
                        break
                    outcome = attempt(conversation)
                    done.put((conversation.id, outcome))
                done.put(None)
            except Exception as error:  # noqa: BLE001 - raised again by the reader below
                done.put(error)

        def attempt(conversation: Sample) -> Answer | BadSample | None:
            try:
                answer = None
                for so_far in self.stream(conversation, sampling):
                    if stop.is_set():
                        break
                    answer = so_far
                return answer
            except BadSample as error:
                return error
            except EndpointDown:
                raise
            except EndpointError as error:
                return BadSample(conversation.id, str(error))

        _ = self.model  # once, before the threads
        # daemons: a request that hangs must not keep the process from ending
        for _ in range(batch_size):
            threading.Thread(target=work, daemon=True).start()
        running = batch_size
        try:
            while running:
                outcome = done.get()
                if isinstance(outcome, Exception):
                    raise outcome
                if outcome is None:
                    running -= 1
                else:
                    yield outcome
        finally:
            stop.set()

    @contextmanager
    def _explained(self, sample_id: str) -> Iterator[None]:
        """What the client raises, in one sentence."""
        try:
            yield
        except openai.APIConnectionError as error:
            if type(error.__cause__).__name__ in ("ConnectError", "ConnectTimeout"):
                raise EndpointDown(
                    f"{self.url} cannot be reached ({error.__cause__}); is the server running?"
                ) from None
            if isinstance(error, openai.APITimeoutError):
                raise EndpointError(
                    f"{self.url} was silent for {self.timeout:g} s; allow it more by --timeout"
                ) from None
            raise EndpointError(f"{self.url} broke off ({error.__cause__ or error})") from None
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise EndpointDown(
                f"{self.url} refuses the API key ({_said(error)}); "
                "give another by --api_key or OPENAI_API_KEY"
            ) from None
        except openai.NotFoundError as error:
            raise EndpointDown(
                f"{self.url} does not have what was asked for ({_said(error)}); "
                "check the URL and --model_name"
            ) from None
        except openai.APIStatusError as error:
            if error.status_code in (400, 413, 422):
                raise BadSample(sample_id, f"{self.url} refuses it: {_said(error)}") from None
            raise EndpointError(f"{self.url} failed ({_said(error)})") from None
        except (openai.APIError, ValueError) as error:  # an error inside the stream, or no JSON
            raise EndpointError(f"{self.url} failed ({_said(error)})") from None


def _said(error: Exception) -> str:
    """The server's own words, on one line."""
    body = getattr(error, "body", None)
    if isinstance(body, dict):
        body = body.get("message") or body.get("detail")
    words = " ".join(str(body or error).split())
    code = getattr(error, "status_code", None)
    return f"{code}: {words[:400]}" if code else words[:400]

"""An OpenAI-compatible server whose answers are known: real HTTP, real failures.

`answers` maps a phrase of the question to what is said to it: a text; an HTTP status; or a
completion's message, e.g. {"content": "", "finish_reason": "length"}.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from tests.serve.fake_endpoint import MODELS, Handler, serving

Answer = str | int | dict
FOREVER = float("inf")


class KnownHandler(Handler):
    def _answer(self, request: dict) -> None:
        server = self.server
        with server.lock:
            server.answered += 1
            number = server.answered
        if number > server.holds_after:
            server.released.wait(60)
        if number > server.breaks_after:
            self.close_connection = True
            return None
        content = request["messages"][-1]["content"]
        parts = [{"text": content}] if isinstance(content, str) else content
        text = "".join(part.get("text", "") for part in parts)
        said = next((said for phrase, said in server.answers.items() if phrase in text), 404)
        if isinstance(said, int):
            return self._error(said, "as asked for")
        message = {"content": said} if isinstance(said, str) else dict(said)
        finish_reason = message.pop("finish_reason", "stop")
        return self._json(200, self._completion(message=message, finish_reason=finish_reason))


@contextmanager
def knowing(
    answers: Mapping[str, Answer],
    breaks_after: float = FOREVER,
    holds_after: float = FOREVER,
    models: tuple[str, ...] = MODELS,
) -> Iterator:
    """A server in a thread.

    After `breaks_after` requests it hangs up on every further one, after `holds_after` it lets
    them wait.
    """
    with serving(models) as server:
        server.RequestHandlerClass = KnownHandler
        server.answers, server.answered = answers, 0
        server.breaks_after, server.holds_after = breaks_after, holds_after
        yield server

"""A small OpenAI-compatible server for tests: real HTTP, real streaming, canned answers.

    python tests/serve/fake_endpoint.py [PORT]     # prints its URL

What it says is read from the last user message: `say WORDS` is answered with the words, one per
chunk; `fail STATUS` with that HTTP status; `hang` with one word and then silence; `break` with
one word and a closed connection; `think` with a thought and an answer; `tag` with an image tag;
anything else with a description of what arrived. It keeps every request.
"""

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MODELS = ("fake-vl",)
API_KEY = "EMPTY"
MAX_BODY = 64 * 1024 * 1024


class FakeEndpoint(ThreadingHTTPServer):
    """Listens on 127.0.0.1; `requests` are the bodies that arrived, in order."""

    daemon_threads = True

    def __init__(self, port: int = 0, models: tuple[str, ...] = MODELS) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.models, self.requests = models, []
        self.released = threading.Event()
        """Set to end answers that hang."""
        self.most_at_once = self.now = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address) -> None:
        """Clients that hang up are part of the tests."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeEndpoint

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/requests":  # for tests that run the server as a process
            return self._json(200, self.server.requests)
        if self.path != "/v1/models":
            return self._error(404, f"no route {self.path}")
        if self._authorised():
            self._json(
                200, {"data": [{"id": name, "object": "model"} for name in self.server.models]}
            )

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        body = self.rfile.read(min(length, MAX_BODY))
        if length > MAX_BODY:
            return self._error(413, "request too large")
        if self.path != "/v1/chat/completions":
            return self._error(404, f"no route {self.path}")
        if not self._authorised():
            return None
        request = json.loads(body)
        with self.server.lock:
            self.server.requests.append(request)
            self.server.now += 1
            self.server.most_at_once = max(self.server.most_at_once, self.server.now)
        try:
            self._answer(request)
        finally:
            with self.server.lock:
                self.server.now -= 1

    def _answer(self, request: dict) -> None:
        if request["model"] not in self.server.models:
            return self._error(404, f"The model `{request['model']}` does not exist.")
        content = request["messages"][-1]["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        text = "".join(part.get("text", "") for part in parts)
        kind, _, rest = text.partition(" ")
        if kind == "fail":
            return self._error(int(rest), "as asked\nfor")
        media = [part["type"] for part in parts if part["type"] != "text"]
        known = {"say": rest, "hang": "wait", "break": "wait", "tag": "an <image> tag"}
        words = known.get(kind, f"saw {len(media)} media")
        words = words.split(" ")
        if not request.get("stream"):
            message = {"role": "assistant", "content": " ".join(words)}
            return self._json(200, self._completion(message=message, finish_reason="stop"))
        room = request["max_tokens"]
        chunks = [{"content": word if i == 0 else f" {word}"} for i, word in enumerate(words)]
        if kind == "think":
            chunks = [{"reasoning": "let me see"}, {"content": "done"}]
        finish = "stop" if len(chunks) <= room else "length"
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.close_connection = True
        self.end_headers()
        self._event({"delta": {"role": "assistant", "content": ""}, "finish_reason": None})
        for delta in chunks[:room]:
            self._event({"delta": delta, "finish_reason": None})
        if kind == "hang":
            self.server.released.wait(60)
        if kind == "break":
            return None
        self._event({"delta": {}, "finish_reason": finish})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, choice: dict) -> None:
        self.wfile.write(f"data: {json.dumps(self._completion(**choice))}\n\n".encode())
        self.wfile.flush()

    def _completion(self, **choice) -> dict:
        return {
            "id": "x",
            "object": "chat.completion.chunk",
            "created": 0,
            "model": MODELS[0],
            "choices": [{"index": 0, **choice}],
        }

    def _authorised(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {API_KEY}":
            return True
        self._error(401, "Unauthorized")
        return False

    def _error(self, status: int, message: str) -> None:
        self._json(status, {"error": {"message": message, "type": "error", "code": status}})

    def _json(self, status: int, value: object) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def serving(models: tuple[str, ...] = MODELS) -> Iterator[FakeEndpoint]:
    """A server in a thread of this process."""
    server = FakeEndpoint(models=models)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        server.server_close()
        thread.join()


if __name__ == "__main__":
    process = FakeEndpoint(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
    print(process.url, flush=True)
    process.serve_forever()

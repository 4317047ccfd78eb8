"""Stands in for the command `vllm` in tests/serve/launch: starts at once, and misbehaves on demand.

Like the real one it answers /health and has an engine process of its own; unlike it, it leaves the
engine behind when it ends. FAKE_VLLM says how else it behaves, FAKE_RECORD where it writes down
what it was given.
"""

import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path


class Health(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, *_args) -> None:
        pass


behaviour = os.environ.get("FAKE_VLLM", "")
stubborn = ["trap '' TERM INT;"] * (behaviour == "stubborn")
engine = subprocess.Popen(["sh", "-c", " ".join([*stubborn, "sleep 600; true"])])
record = {
    "arguments": sys.argv[1:],
    "key": os.environ.get("VLLM_API_KEY"),
    "pid": os.getpid(),
    "group": os.getpgid(0),
}
partial = Path(os.environ["FAKE_RECORD"] + ".partial")
partial.write_text(json.dumps(record))
partial.rename(os.environ["FAKE_RECORD"])  # whole or absent: the test waits for it
print("fake vLLM: loading", flush=True)
if behaviour == "fails":
    print("ValueError: no such kernel", file=sys.stderr)
    sys.exit(3)
if behaviour == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if behaviour == "hangs":
    time.sleep(600)
time.sleep(0.5)
flags = dict(zip(sys.argv, sys.argv[1:], strict=False))
HTTPServer((flags["--host"], int(flags["--port"])), Health).serve_forever()

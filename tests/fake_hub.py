"""A hub on this machine: the endpoints that the clients of huggingface and modelscope ask."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs, unquote, urlsplit

DEFAULT_BRANCHES = ("main", "master")


@dataclass
class FakeHub:
    """Repositories and what was asked of them; `fake_hub()` serves one."""

    url: str = ""
    repositories: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    """owner/name -> revision -> path -> content"""
    answers: dict[str, tuple[int, str]] = field(default_factory=dict)
    """owner/name -> the HTTP status and X-Error-Code that its files are refused with."""
    drops: dict[str, int] = field(default_factory=dict)
    """path -> byte of the file after which the connection ends, as often as it is asked for."""
    asked: list[str] = field(default_factory=list)
    """`METHOD path` of the request for each file, with ` from N` where it asked for a range."""
    lookups: int = 0
    """How often huggingface's client asked for a branch's commit."""

    def add(self, name: str, folder: Path, revision: str = "main") -> str:
        """Put a folder's files into a repository; its commit."""
        files = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        self.repositories.setdefault(name, {})[revision] = files
        return self.commit(name, revision)

    def commit(self, name: str, revision: str) -> str:
        content = self.repositories[name][revision]
        return hashlib.sha1(repr(sorted(content.items())).encode()).hexdigest()

    def files(self, name: str, revision: str) -> dict[str, bytes] | None:
        """Those of a branch or a commit."""
        branches = self.repositories.get(name, {})
        if revision in DEFAULT_BRANCHES:
            revision = next((b for b in DEFAULT_BRANCHES if b in branches), revision)
        by_commit = {self.commit(name, branch): branch for branch in branches}
        return branches.get(by_commit.get(revision, revision))

    def environment(self, folder: Path) -> dict[str, str]:
        """Variables under which both clients ask this hub and keep what they get in `folder`."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(folder / "hf"),
            "HF_HUB_OFFLINE": "0",
            "MODELSCOPE_ENDPOINT": self.url,
            "MODELSCOPE_CACHE": str(folder / "ms"),
            "MODELSCOPE_HOME": str(folder / "ms_home"),
            "MODELSCOPE_DOWNLOAD_MAX_RETRIES": "0",
            "no_proxy": "127.0.0.1",
        }


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    hub = FakeHub()

    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def do_GET(self) -> None:
        path, query = unquote(urlsplit(self.path).path), parse_qs(urlsplit(self.path).query)
        parts = path.strip("/").split("/")
        match parts:
            case ["api", "v1", "models", owner, name, "repo", "files"]:
                self._modelscope_tree(f"{owner}/{name}", query["Revision"][0])
            case ["api", "v1", "models", owner, name, "repo"]:
                self._file(f"{owner}/{name}", query["Revision"][0], query["FilePath"][0])
            case ["api", "models", owner, name]:
                self._info(f"{owner}/{name}", "main")
            case ["api", "models", owner, name, "revision", *revision]:
                self._info(f"{owner}/{name}", "/".join(revision))
            case ["api", "models", owner, name, "tree", revision]:
                self._tree(f"{owner}/{name}", revision)
            case [owner, name, "resolve", revision, *file]:
                self._file(f"{owner}/{name}", revision, "/".join(file))
            case _:
                self._refuse(404, "")

    do_HEAD = do_GET

    def _info(self, name: str, revision: str) -> None:
        self.hub.lookups += 1
        files = self._find(name, revision)
        if files is not None:
            siblings = [{"rfilename": path} for path in files]
            branch = next(b for b, f in self.hub.repositories[name].items() if f is files)
            sha = self.hub.commit(name, branch)
            self._json({"id": name, "modelId": name, "sha": sha, "siblings": siblings})

    def _tree(self, name: str, revision: str) -> None:
        files = self._find(name, revision)
        if files is not None:
            entries = [
                {"type": "file", "path": path, "size": len(content), "oid": _sha256(content)[:40]}
                for path, content in files.items()
            ]
            self._json(entries)

    def _modelscope_tree(self, name: str, revision: str) -> None:
        files = self._find(name, revision)
        if files is not None:
            entries = [
                {"Type": "blob", "Path": path, "Size": len(content), "Sha256": _sha256(content)}
                for path, content in files.items()
            ]
            self._json({"Code": 200, "Success": True, "Data": {"Files": entries}})

    def _find(self, name: str, revision: str) -> dict[str, bytes] | None:
        """The files, or None after the request was refused."""
        if name not in self.hub.repositories:
            # huggingface tells a stranger 401 of what does not exist, too
            self._refuse(404 if self.path.startswith("/api/v1/") else 401, "RepoNotFound")
            return None
        files = self.hub.files(name, revision)
        if files is None:
            self._refuse(404, "RevisionNotFound")
        return files

    def _file(self, name: str, revision: str, path: str) -> None:
        start = int(self.headers.get("Range", "bytes=0-").split("=")[1].split("-")[0])
        part = f" from {start}" if "Range" in self.headers else ""
        self.hub.asked.append(f"{self.command} {path}{part}")
        if name in self.hub.answers:
            return self._refuse(*self.hub.answers[name])
        files = self._find(name, revision)
        if files is None:
            return None
        content = files[path]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{_sha256(content)}"')
        self.send_header("X-Repo-Commit", revision)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[start : self.hub.drops.get(path)])

    def _json(self, value: object) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def _refuse(self, status: int, code: str) -> None:
        content = json.dumps({"Code": status, "Message": code, "Success": False}).encode()
        self.send_response(status)
        if not self.path.startswith("/api/v1/"):  # modelscope says it in the status alone
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_arguments: object) -> None:
        pass


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()

"""Data sets by hub id: the real clients against a hub on this machine."""

import hashlib
import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from tests.data.samples import row, write_image, write_jsonl
from tests.fake_hub import FakeHub
from tests.http_server import serving_http

pytest.importorskip("datasets")
ROOT = Path(__file__).parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SCRIPT = """
import json, sys
from vlm.data.sources import open_sources
said = []
for spec, options in json.loads(sys.argv[1]):
    try:
        (source,) = open_sources([spec], **options)
        samples = [source.parse(r, p) for chunk in source.chunks()
                   for p, r in zip(chunk.places, chunk.rows)]
        said.append([[s.id, s.messages[0].content, *map(str, s.images)] for s in samples])
    except ValueError as error:
        said.append(f"{type(error).__name__} {error}")
print(json.dumps(said))
"""


class Handler(BaseHTTPRequestHandler):
    """One data set, `owner/data`, as both hubs serve it."""

    def do_GET(self):
        path, query = unquote(urlsplit(self.path).path), parse_qs(urlsplit(self.path).query)
        self.server.asked.append(self.path)
        files = self.server.files
        match path.strip("/").split("/"):
            case ["api", "v1", "datasets", "owner", "data", "repo", "tree"]:
                entries = [
                    {"Type": "blob", "Path": name, "Size": len(content), "Sha256": sha(content)}
                    for name, content in files.items()
                ]
                data = {"Files": entries, "TotalCount": len(entries)}
                self.answer(json.dumps({"Code": 200, "Success": True, "Data": data}).encode())
            case ["api", "v1", "datasets", "owner", "data", "repo"]:
                self.answer(files[query["FilePath"][0]])
            case ["api", "datasets", "owner", "data", *rest] if rest[:1] in ([], ["revision"]):
                siblings = [{"rfilename": name} for name in files]
                about = {"id": "owner/data", "sha": COMMIT, "siblings": siblings}
                self.answer(json.dumps(about).encode())
            case ["api", "datasets", "owner", "data", "tree", _, *folder]:
                inside = "".join(f"{part}/" for part in folder)
                entries = [
                    {"type": "file", "path": name, "size": len(content), "oid": sha(content)[:40]}
                    for name, content in files.items()
                    if name.startswith(inside)
                ]
                self.answer(
                    json.dumps(entries).encode() if entries else b"{}", 200 if entries else 404
                )
            case ["datasets", "owner", "data", "resolve", _, *name] if "/".join(name) in files:
                self.answer(files["/".join(name)])
            case _:
                self.answer(b"{}", 404)

    do_HEAD = do_POST = do_GET

    def answer(self, content, status=200):
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{sha(content)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        if status == 404:
            unknown = "owner/data" not in self.path
            self.send_header("X-Error-Code", "RepoNotFound" if unknown else "EntryNotFound")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_arguments):
        pass


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def hub(tmp_path):
    folder = tmp_path / "repository"
    (folder / "images").mkdir(parents=True)
    write_image(folder / "images" / "a.png", 56, 56)
    rows = [row("<image>what?", images=["images/a.png"]), row("<image>", images=["../../x.png"])]
    write_jsonl(folder / "train.jsonl", rows)
    write_jsonl(folder / "test.jsonl", rows[:1])
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.*")}
    with serving_http(Handler) as server:
        server.files = {name: path.read_bytes() for name, path in files.items()}
        yield server


def opened(server, tmp_path, *asked, **variables):
    """What a process of its own finds (rows) or says (an error) of each (spec, options)."""
    environment = FakeHub(server.url).environment(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(asked)],
        cwd=ROOT,
        env=os.environ | environment | variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_data_sets_of_huggingface(hub, tmp_path):
    root = str(tmp_path / "repository")
    spec = {"path": "owner/data@main", "limit": 1, "split": "train", "media_root": root}
    rootless, limited, leaving, absent, file = opened(
        hub,
        tmp_path,
        ("owner/data", {}),
        (spec, {}),
        ("owner/data", {"media_root": root}),
        ("owner/absent", {}),
        ("owner/absent.jsonl", {}),
    )
    assert rootless.startswith("BadSample owner/data:0: an image is the path images/a.png, but")
    assert limited == [["owner/data@main/train:0", "<image>what?", f"{root}/images/a.png"]]
    assert leaving == f"BadSample owner/data:1: ../../x.png leads out of the media root {root}"
    assert absent.startswith("DataError owner/absent cannot be opened as a data set (")
    assert file == "DataError owner/absent.jsonl does not exist"
    hub.asked.clear()
    assert opened(hub, tmp_path, ("owner/data", {}), HF_HUB_OFFLINE="1") == [rootless]
    assert not hub.asked


def test_data_sets_of_modelscope(hub, tmp_path):
    pytest.importorskip("modelscope", reason="its client is not installed")
    there = {"hub": "modelscope"}
    first, test, absent = opened(
        hub,
        tmp_path,
        ("owner/data@v1#1", there),
        ({"path": "owner/data@v1", "split": "test", **there}, {}),
        ("owner/absent", there),
    )
    name, text, image = first[0]
    assert len(first) == 1 and (name, text) == ("owner/data@v1:0", "<image>what?")
    assert Path(image).read_bytes() == hub.files["images/a.png"]  # comes with the data
    assert [row[0] for row in test] == ["owner/data@v1/test:0"]
    assert absent.startswith("DataError owner/absent is no path here and could not be had from mod")
    assert any("Revision=v1" in path for path in hub.asked)
    hub.asked.clear()
    assert opened(hub, tmp_path, ("owner/data@v1#1", there), HF_HUB_OFFLINE="1") == [first]
    assert not hub.asked

"""Media given as URLs: refused, or fetched once from a server on this machine."""

from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from tests.http_server import serving_http
from vlm.data.formats import download
from vlm.data.formats.context import RowContext
from vlm.data.formats.media_source import find_media
from vlm.data.schema import BadSample


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        if self.path == "/gone.png":
            return self.send_error(404)
        if self.path == "/away.png":
            self.send_response(302)
            self.send_header("Location", "file:///etc/hostname")
            return self.end_headers()
        self.send_response(200)
        self.send_header("Content-Length", "100000000" if self.path == "/torn.png" else "300000")
        self.end_headers()
        self.wfile.write(b"x" * 300_000)
        return None

    def log_message(self, *_arguments):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("GRAFTVL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving_http(Handler) as server:
        yield server


def find(url, allow_urls=True, media_root=None):
    return find_media(url, "image", "data.jsonl:1", RowContext(Path("/x"), media_root, allow_urls))


def cached(tmp_path) -> list[Path]:
    return list((tmp_path / "cache" / "media").iterdir())


def test_a_url_is_fetched_once_and_then_read_from_the_cache(server, tmp_path):
    first = find(f"{server.url}/a.png?size=large")
    assert first.read_bytes() == b"x" * 300_000
    assert find({"url": f"{server.url}/a.png?size=large"}, media_root=tmp_path) == first
    assert server.asked == ["/a.png?size=large"]
    assert find(f"{server.url}/a.png?size=small") != first
    assert len(cached(tmp_path)) == 2


@pytest.mark.parametrize("scheme", ["http", "https", "ftp", "s3", "HTTP"])
def test_no_url_is_fetched_by_default(server, tmp_path, scheme):
    url = server.url.replace("http", scheme, 1)
    with pytest.raises(BadSample, match=r"data\.jsonl:1: .*images are not fetched; save them"):
        find(f"{url}/a.png", allow_urls=False)
    assert not server.asked
    assert not (tmp_path / "cache").exists()


def test_only_http_is_fetched(server, tmp_path):
    for url in (server.url.replace("http", "ftp", 1) + "/a.png", "s3://bucket/a.png"):
        with pytest.raises(BadSample, match="not fetched"):
            find(url)
    with pytest.raises(BadSample, match=r"away\.png cannot be fetched"):
        find(f"{server.url}/away.png")
    assert not cached(tmp_path)


@pytest.mark.parametrize(
    ("name", "reason"), [("gone.png", "404"), ("torn.png", "cut off"), ("a b.png", "URL can't")]
)
def test_what_fails_is_one_sentence_and_leaves_nothing(server, tmp_path, name, reason):
    with pytest.raises(BadSample, match=rf"{name} cannot be fetched .*{reason}") as error:
        find(f"{server.url}/{name}")
    assert "\n" not in str(error.value)
    assert not cached(tmp_path)


def test_nobody_there_is_one_sentence(server, tmp_path):
    with pytest.raises(BadSample, match="cannot be fetched"):
        find("http://127.0.0.1:9/a.png")
    with pytest.raises(BadSample, match="cannot be fetched"):
        find("http://[broken/a.png")
    assert not cached(tmp_path)


def test_size_and_time_are_bounded(server, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(download, "MOST_BYTES", 200_000)
        with pytest.raises(BadSample, match="larger than"):
            find(f"{server.url}/a.png")
    with monkeypatch.context() as patch:
        patch.setattr(download, "MOST_SECONDS", 0.0)
        patch.setattr(download, "SILENT_SECONDS", 5.0)
        with pytest.raises(BadSample, match="takes more than"):
            find(f"{server.url}/a.png")
    assert not cached(tmp_path)

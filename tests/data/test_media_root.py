"""Where paths of media lead: beside the data file, or inside a media root and nowhere else."""

import base64
import os
from pathlib import Path

import pytest

from vlm.data.formats.context import RowContext
from vlm.data.formats.media_source import find_media
from vlm.data.schema import BadSample


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "root"
    (root / "in").mkdir(parents=True)
    (root / "in" / "a b.png").write_bytes(b"inside")
    (tmp_path / "secret.png").write_bytes(b"outside")
    (tmp_path / "rootless").mkdir()
    (root / "out.png").symlink_to(tmp_path / "secret.png")
    (root / "up").symlink_to(tmp_path)
    (root / "near.png").symlink_to("in/a b.png")
    (root / "loop").symlink_to("loop")
    return root


def find(source, context, kind="image"):
    return find_media(source, kind, "data.jsonl:1", context)


def inside(root: Path) -> RowContext:
    return RowContext(Path("/elsewhere"), root)


@pytest.mark.parametrize(
    "name",
    [
        "in/a b.png",
        "./in/../in/a b.png",
        "{root}/in/a b.png",
        "file://{root}/in/a%20b.png",
        "file://localhost{root}/in/a%20b.png",
        "near.png",
    ],
)
def test_a_path_inside_the_root_is_found(root, name):
    for source in (name, {"path": name}, {"url": name}, {"bytes": None, "path": name}):
        if isinstance(source, dict):
            source = {key: value and value.format(root=root) for key, value in source.items()}
        else:
            source = source.format(root=root)
        assert find(source, inside(root)).read_bytes() == b"inside"


@pytest.mark.parametrize(
    "name",
    [
        "../secret.png",
        "in/../../secret.png",
        "{root}/../secret.png",
        "{root}less/a.png",  # begins with the root's name
        "/etc/hostname",
        "file:///etc/hostname",
        "file://{root}/%2e%2e/secret.png",
        "out.png",
        "up/secret.png",
        "up/absent.png",
    ],
)
def test_no_path_leaves_the_root(root, name):
    name = name.format(root=root)
    for source, kind in ((name, "image"), ({"path": name}, "video"), ([name, name], "video")):
        with pytest.raises(BadSample, match=r"data\.jsonl:1: .* leads out of the media root"):
            find(source, inside(root), kind)


def test_a_root_may_be_a_link_or_relative(root, monkeypatch):
    monkeypatch.chdir(root.parent)
    (root.parent / "link").symlink_to(root)
    for place in (Path("root"), root.parent / "link", Path(".") / "root" / ".."):
        name = "root/in/a b.png" if place.name == ".." else "in/a b.png"
        assert find(name, inside(place)).read_bytes() == b"inside"


def test_what_is_no_path_is_a_bad_sample_too(root):
    with pytest.raises(BadSample, match="is not a path"):
        find("a\0b.png", inside(root))
    for name in ("x" * 5000, "loop", "loop/a.png"):  # found absent when it is opened
        assert not os.path.exists(find(name, inside(root)))


def test_without_a_root_paths_are_relative_to_the_data_file(root):
    beside = RowContext(root)
    assert find("in/a b.png", beside) == root / "in" / "a b.png"
    assert find("../secret.png", beside).read_bytes() == b"outside"
    assert find("/etc/hostname", beside) == Path("/etc/hostname")


def test_paths_of_a_hub_need_a_root(root):
    hub = RowContext(None)
    with pytest.raises(BadSample, match=r"the path in/a\.png.*comes from a hub; set media_root"):
        find("in/a.png", hub)
    with pytest.raises(BadSample, match="set media_root"):
        find("/etc/hostname", hub)
    assert find(b"bytes", hub) == b"bytes"
    assert find("in/a b.png", RowContext(None, root)).read_bytes() == b"inside"


def test_bytes_come_raw_or_in_base64(root):
    text = base64.b64encode(b"inside").decode()
    uri = f"data:image/png;base64,{text}"
    for source in (
        b"inside",
        {"bytes": b"inside", "path": "x"},
        {"bytes": text},
        uri,
        {"url": uri},
    ):
        assert find(source, inside(root)) == b"inside"
    for source in (b"", {}, {"bytes": None}, 5, None, "", ["a.png"], {"bytes": 5}):
        with pytest.raises(BadSample, match="an image is given as"):
            find(source, inside(root))
    with pytest.raises(BadSample, match="a video's base64 is damaged"):
        find("data:video/mp4;base64,!", inside(root), "video")


def test_the_fingerprint_tells_where_paths_lead(root):
    contexts = [
        RowContext(root),
        RowContext(root / "in"),
        RowContext(None),
        RowContext(root, root),
        RowContext(root, root / "in"),
        RowContext(root, None, True),
    ]
    assert len({context.fingerprint() for context in contexts}) == len(contexts)
    again = RowContext(root / "in" / "..")
    assert again.fingerprint() == RowContext(root).fingerprint()

"""What a row gives as an image or a video -> a file or the encoded bytes.

A path, a file URL, a data URI, bytes, `{"bytes": ...}` (raw or base64), `{"path": ...}`,
`{"url": ...}`, an http(s) URL where those are allowed; of a video also the list of its frames.
"""

import base64
import os
import string
from pathlib import Path
from urllib.parse import unquote

from vlm.data.formats.context import RowContext
from vlm.data.formats.download import DownloadError, download
from vlm.data.schema import BadSample, Media, Video

ARTICLES = {"image": "an image", "video": "a video"}
NO_SPACE = {ord(space): None for space in string.whitespace}
"""Base64 is often written in lines."""


def find_media(source: object, kind: str, sample_id: str, context: RowContext) -> Video:
    """An image or a video (`kind`) as a sample has it; nothing but a download is read yet.

    Raises:
        BadSample: it is given in no such way, or leads out of the media root.
    """
    if kind == "video" and isinstance(source, list):
        return tuple(find_media(frame, "image", sample_id, context) for frame in source)
    if isinstance(source, dict):
        keys = (key for key in ("bytes", "path", "url") if source.get(key) is not None)
        key = next(keys, None)
        source = source.get(key)
        if key == "bytes" and isinstance(source, str):
            source = f"data:;base64,{source}"
    if isinstance(source, bytes) and source:
        return source
    if not isinstance(source, str) or not source:
        raise BadSample(
            sample_id, f"{ARTICLES[kind]} is given as {source!r:.80}; use a path or a data URI"
        )
    if source.startswith("data:"):
        return _decode(source, kind, sample_id)
    if source.startswith("file://"):
        source = unquote(source.removeprefix("file://").removeprefix("localhost"))
    elif "://" in source:
        return _fetch(source, kind, sample_id, context)
    return _path(source, kind, sample_id, context)


def _decode(uri: str, kind: str, sample_id: str) -> bytes:
    text = uri.partition(",")[2].translate(NO_SPACE)
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise BadSample(sample_id, f"{ARTICLES[kind]}'s base64 is damaged ({error})") from None


def _fetch(url: str, kind: str, sample_id: str, context: RowContext) -> Media:
    if not context.allow_urls or not url.startswith(("http://", "https://")):
        raise BadSample(
            sample_id, f"{url:.200}: {kind}s are not fetched; save them beside the data"
        )
    try:
        return download(url)
    except DownloadError as error:
        raise BadSample(sample_id, str(error)) from None


def _path(source: str, kind: str, sample_id: str, context: RowContext) -> Path:
    folder = context.media_root or context.folder
    if folder is None:
        raise BadSample(
            sample_id,
            f"{ARTICLES[kind]} is the path {source:.200}, but the data comes from a hub; set "
            "media_root to the directory that it is relative to",
        )
    if context.media_root is None:
        return folder / source
    root = os.path.realpath(folder)
    try:
        real = os.path.realpath(os.path.join(root, source))
    except ValueError:
        raise BadSample(sample_id, f"{source!r:.200} is not a path of {ARTICLES[kind]}") from None
    if os.path.commonpath([root, real]) != root:
        raise BadSample(sample_id, f"{source:.200} leads out of the media root {folder}")
    return Path(real)

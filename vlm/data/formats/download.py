"""Images and videos given as http(s) URLs: fetched once, then read from a cache on disk.

`$GRAFTVL_CACHE/media` (`~/.cache/graftvl/media`) holds each in a file named by the SHA-256 of its
URL, so that an index and the training that follows see the same bytes, without the network.
"""

import os
import time
import urllib.request
from hashlib import sha256
from http.client import HTTPException
from pathlib import Path
from tempfile import NamedTemporaryFile

MOST_BYTES = 256 * 2**20
MOST_SECONDS = 60
SILENT_SECONDS = 15
"""A server that sends nothing for so long is given up."""


class DownloadError(ValueError):
    """A URL that could not be fetched, and why."""


def download(url: str) -> Path:
    """The file with what the URL gave when it was first asked for.

    Raises:
        DownloadError: no answer, too slow or too large.
    """
    cache = Path(os.environ.get("GRAFTVL_CACHE") or "~/.cache/graftvl").expanduser() / "media"
    path = cache / sha256(url.encode("utf-8", "surrogatepass")).hexdigest()
    if path.exists():
        return path
    cache.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile(dir=cache, delete=False) as file:
        try:
            _fetch(url, file)
        except (OSError, ValueError, HTTPException) as error:
            Path(file.name).unlink()
            raise DownloadError(f"{url:.200} cannot be fetched ({error!s:.200})") from None
    os.replace(file.name, path)  # whole or not there, also where several fetch it at once
    return path


def _fetch(url: str, file) -> None:
    end = time.monotonic() + MOST_SECONDS
    size = 0
    with urllib.request.urlopen(url, timeout=SILENT_SECONDS) as answer:
        while block := answer.read1(2**16):
            size += len(block)
            if size > MOST_BYTES:
                raise ValueError(f"it is larger than {MOST_BYTES >> 20} MiB")
            if time.monotonic() > end:
                raise ValueError(f"it takes more than {MOST_SECONDS} seconds")
            file.write(block)
        if answer.length:
            raise ValueError(f"it is cut off, {answer.length} bytes are missing")

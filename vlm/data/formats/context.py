"""RowContext: what the meaning of a row's paths depends on, beside the row itself."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RowContext:
    folder: Path | None
    """What relative paths of images and videos are relative to, where no media root is set: the
    directory of the data file. None for rows of a hub, which have no such place."""
    media_root: Path | None = None
    """Where set, relative paths are relative to it and no path may leave it."""
    allow_urls: bool = False
    """Whether http(s) URLs are downloaded; otherwise a row that has one is a bad sample."""

    def fingerprint(self) -> bytes:
        """Differs where the same row may mean other media."""
        folders = (str(path and path.resolve()) for path in (self.folder, self.media_root))
        return repr((*folders, self.allow_urls)).encode("utf-8", "surrogateescape")

"""What a run of one benchmark is told."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Judge:
    """A model that scores answers, behind an OpenAI-compatible endpoint."""

    api_base: str
    model: str
    api_key: str = "EMPTY"


@dataclass(frozen=True)
class Options:
    api_base: str
    """The endpoint's base URL, which ends in `/v1`."""
    model: str
    """As the endpoint calls it."""
    checkpoint: str
    """As the results call it."""
    folder: Path
    """The result's directory; the backend's own files go to `backend/` in it."""
    api_key: str = "EMPTY"
    data_root: Path | None = None
    """Where data lies that shall not be downloaded: `DATA_ROOT/NAME` or `DATA_ROOT/<hub id>`."""
    limit: int | None = None
    """Samples of each subset; for a trial, never for a score."""
    resume: bool = False
    """Go on from what is in `folder`."""
    judge: Judge | None = None
    concurrency: int = 16
    """Requests at a time."""
    timeout: float = 600.0
    """Seconds that one answer may take."""
    retries: int = 2
    """Further tries of a request that failed for the server's sake."""
    weights: str = ""
    """Fingerprint of the export that is served; empty for an endpoint of which nobody knows."""

    @property
    def backend_folder(self) -> Path:
        return self.folder / "backend"

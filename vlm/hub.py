"""A model named by its directory or by its hub id -> the directory that it lies in.

What is no directory and reads `owner/name` or `owner/name@revision` comes from a hub, through the
hub's own client and into its own cache: `huggingface_hub` (HF_HOME, HF_ENDPOINT, HF_TOKEN) or
`modelscope` (MODELSCOPE_CACHE, MODELSCOPE_ENDPOINT, MODELSCOPE_API_TOKEN). HF_HUB_OFFLINE=1 keeps
both from the network: then the cache has it, or nobody has.
"""

import argparse
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args

from vlm.hf_config import ConfigError

Hub = Literal["huggingface", "modelscope"]
HUB_ID = re.compile(r"(?P<id>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>\w[\w./-]*))?", re.ASCII)
LONGEST_ID = 300
WANTED = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.py"]
"""No pickled weights; the code of an export tells that it is one, and with which limits."""
LOGIN = {"huggingface": "hf auth login", "modelscope": "modelscope login"}
CACHE = {"huggingface": "HF_HOME", "modelscope": "MODELSCOPE_CACHE"}
FULL, FORBIDDEN = (errno.ENOSPC, errno.EDQUOT), (errno.EACCES, errno.EPERM, errno.EROFS)


def add_hub_argument(parser: argparse.ArgumentParser) -> None:
    """`--hub`, for a command whose models may be hub ids."""
    parser.add_argument(
        "--hub",
        choices=get_args(Hub),
        default="huggingface",
        help="that has a model given as OWNER/NAME or OWNER/NAME@REVISION",
    )


def resolve_model(reference: str | Path, hub: Hub = "huggingface") -> Path:
    """The directory of a model, downloaded if need be.

    Args:
        reference: an existing directory, or else `owner/name[@revision]`. A path that starts with
            `.`, `/` or `~`, or has several parts, is never looked for on a hub.

    Returns:
        The directory as it was given, or the hub cache's snapshot. In huggingface's cache that
        is named by the commit.

    Raises:
        ConfigError: there is no such directory or model, or it cannot be had now.
    """
    path, text = Path(reference), str(reference)
    if text and os.path.isdir(path):  # unlike Path's, no error where a name is too long
        return path
    if text and os.path.exists(path):
        raise ConfigError(f"{path} is a file; give the directory of a model, or a hub id")
    match = HUB_ID.fullmatch(text) if len(text) <= LONGEST_ID else None
    if match is None:
        raise ConfigError(
            f"{text[:LONGEST_ID] or 'an empty name'} does not exist; give the directory of a "
            "model, or a hub id"
        )
    download = _from_modelscope if hub == "modelscope" else _from_huggingface
    return download(match["id"], match["revision"])


def _from_huggingface(name: str, revision: str | None) -> Path:
    from huggingface_hub import constants, snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=WANTED))
    except Exception as error:  # noqa: BLE001 - the client's errors have no base of their own
        cache = Path(constants.HF_HUB_CACHE)
        message = _explain(error, "huggingface", name, revision, cache, _offline())
        raise ConfigError(message) from None


def _from_modelscope(name: str, revision: str | None) -> Path:
    try:
        from modelscope.hub.snapshot_download import snapshot_download
    except ImportError:
        raise ConfigError(
            f"{name} is to come from modelscope, whose client is not installed: "
            "pip install graftvl[modelscope]"
        ) from None
    offline = _offline()
    cache = Path(os.environ.get("MODELSCOPE_CACHE") or "~/.cache/modelscope")
    try:
        folder = Path(
            snapshot_download(name, revision, allow_patterns=WANTED, local_files_only=offline)
        )
        # offline this client takes a download that was broken off for a whole one
        if offline and (torn := next(folder.rglob("*.incomplete"), None)):
            raise FileNotFoundError(f"{torn.name} is left of a download that was broken off")
    except Exception as error:  # noqa: BLE001 - the client's errors have no base of their own
        message = _explain(error, "modelscope", name, revision, cache, offline)
        raise ConfigError(message) from None
    return folder


def _offline() -> bool:
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def _explain(
    error: BaseException, hub: Hub, name: str, revision: str | None, cache: Path, offline: bool
) -> str:
    """One sentence: what failed, and what to do."""
    full = f"{name}@{revision}" if revision else name
    causes = list(_causes(error))
    for cause in causes:
        if isinstance(cause, OSError) and cause.errno in FULL + FORBIDDEN:
            trouble = "the disk is full" if cause.errno in FULL else "it cannot be written"
            return (
                f"{full} cannot be kept in {hub}'s cache {cache}: {trouble}; make room, or name "
                f"another place by {CACHE[hub]}"
            )
    if offline:
        return (
            f"{full} is no directory here and not, or not whole, in {hub}'s cache {cache}, and "
            "HF_HUB_OFFLINE forbids to download it; unset that, or copy the model here"
        )
    for cause in causes:
        response = getattr(cause, "response", None)
        status = getattr(response, "status_code", None) or getattr(cause, "status_code", None)
        code = getattr(response, "headers", {}).get("X-Error-Code", "")
        if code == "RevisionNotFound":
            return f"{name} has no revision {revision} on {hub}; give a branch, a tag or a commit"
        if code == "GatedRepo" or status == 403:
            return (
                f"{hub} gives {full} only to those whom it was granted to: ask for access on its "
                f"page, then log in with `{LOGIN[hub]}`"
            )
        if status in (401, 404):
            return (
                f"{full} is neither a directory here nor a model that {hub} shows us; correct "
                f"the name, or log in with `{LOGIN[hub]}` if it is private"
            )
    reason = " ".join(f"{type(causes[-1]).__name__}: {causes[-1]}".split())[:200]
    return (
        f"{full} is no directory here and could not be downloaded from {hub} ({reason}); check "
        "the network and run this again (files that have arrived are kept), or set "
        "HF_HUB_OFFLINE=1 if the cache has them all"
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, those of the single files that it sums up, and what each was caused by."""
    while error is not None:
        yield error
        files = list(getattr(error, "failed_files", {}).values())
        for other in files[1:]:
            yield from _causes(other)
        error = files[0] if files else error.__cause__ or error.__context__

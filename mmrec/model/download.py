"""Encoders fetched from the Hugging Face hub into its cache on this machine."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmrec.bars import bars_are_seen
from mmrec.errors import UserError

# A path has lost one of the slashes.
_NAMED = re.compile(r"hf://?(?P<repo>[^@]+)(?:@(?P<revision>.+))?")
_FILES = ["config.json", "manifest.json", "model.safetensors", "tokenizer/*"]
_MENDS = {
    "RepositoryNotFoundError": "no such repository, or a private one: `hf auth login`, or HF_TOKEN",
    "GatedRepoError": "its owner grants access: ask on its page, then `hf auth login`, or HF_TOKEN",
    "RevisionNotFoundError": "has no such revision; give a branch, a tag or a commit of it",
    "HFValidationError": "neither a folder nor the name of a repository, which is user/name",
    "LocalEntryNotFoundError": "the hub cannot be reached, and nothing of it is in the cache",
}


def local_encoder(place: Path | str) -> Path:
    """A folder as it is; of `hf://user/name`, or `hf://user/name@revision`, the folder that it is fetched to.

    Raises `UserError` as `download_encoder` does.
    """
    named = _NAMED.fullmatch(str(place))
    if named is None:
        return Path(place)
    return download_encoder(named["repo"], revision=named["revision"])


def download_encoder(
    repo_id: str, *, revision: str | None = None, token: str | None = None
) -> Path:
    """Fetch an encoder's files into the hub's cache, if they are not there yet; returns their folder.

    Raises `UserError` where the repository or the revision is missing, cannot be read, or holds no encoder.
    """
    from huggingface_hub import snapshot_download

    named = f"{repo_id}@{revision}" if revision else repo_id
    with told_by_the_hub(named):
        folder = Path(
            snapshot_download(repo_id, revision=revision, token=token, allow_patterns=_FILES)
        )
    if not (folder / "manifest.json").is_file():
        raise UserError(f"{named}: holds no encoder of mmrec (it has no manifest.json)")
    return folder


@contextmanager
def told_by_the_hub(named: str) -> Iterator[None]:
    """Turn what the hub refuses, or a network that is gone, into a `UserError` with its mend."""
    from huggingface_hub import constants, errors
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    # Its own error derives from that of the HTTP client that this version of the hub's library uses.
    refusals: Any = (*errors.HfHubHTTPError.__bases__, OSError, RuntimeError)
    hides = not bars_are_seen() and not are_progress_bars_disabled()
    try:
        if hides:
            disable_progress_bars()
        yield
    except (*refusals, errors.HFValidationError) as error:
        raise UserError(f"{named} at {constants.ENDPOINT}: {_mend(error)}") from None
    finally:
        if hides:
            enable_progress_bars()


def _mend(error: Exception) -> str:
    """What to do about an error of the hub, or what it says where nobody knows."""
    for kind in type(error).__mro__:
        if kind.__name__ in _MENDS:
            return _MENDS[kind.__name__]
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return "not allowed: `hf auth login`, or HF_TOKEN, with a token that may write there"
    said = " ".join(str(error).split())[:200]
    return f"status {status}: {said}" if status else said

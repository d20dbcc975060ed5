"""Files and folders of repositories on the Hub, fetched into its cache."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

FILE_ENDS = (".safetensors", ".gguf", ".json", ".model", ".pth", ".pt", ".bin", ".ckpt")  # what has another end is a folder


def download(text: str, patterns: Sequence[str] | None) -> Path:
    """The local path of `org/repo[@revision][/path]`; of a repository or a folder in it the files that match a pattern are fetched.

    FileNotFoundError where there is none such, or it can be neither fetched nor found whole in the cache.
    """
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    org, name, *inner = text.split("/", 2)
    name, _, revision = name.partition("@")
    below = "".join(inner).strip("/")
    try:
        if below.endswith(FILE_ENDS):
            return Path(hf_hub_download(f"{org}/{name}", below, revision=revision or None))
        wanted = [f"{below}/{pattern}" for pattern in patterns or ("*",)] if below else list(patterns or ()) or None
        return Path(snapshot_download(f"{org}/{name}", revision=revision or None, allow_patterns=wanted)) / below
    except (*HfHubHTTPError.__bases__, HFValidationError) as error:  # type: ignore[misc]  # any error of the HTTP library it is built on, and OSError
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileNotFoundError(f"cannot fetch '{text}' from the Hub, and it is not in the cache: {reason}") from error


def revision_of(path: Path) -> str | None:
    """The commit that a file or folder in the Hub's cache is of, None elsewhere."""
    found = re.search(r"/models--[^/]+/snapshots/([0-9a-f]{40})(/|$)", path.absolute().as_posix())
    return found[1] if found else None

"""Latents with their log-variance, chunk by chunk, from VAEs that offer it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


def with_logvar(vae: Any, chunks: Iterator[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of normalised latents and the log-variance of what they were before, for each chunk of video.

    A VAE offers it as `encode_stream(chunks, with_logvar=True)` or by sessions: `vae.encoder().push(chunk, moments=True)`.
    Raises ValueError for one that offers neither, at once.
    """
    if "with_logvar" in inspect.signature(vae.encode_stream).parameters:
        return iter(vae.encode_stream(chunks, with_logvar=True))
    session = getattr(vae, "encoder", None)
    if session is None or isinstance(session, nn.Module):
        raise ValueError(f"'{vae.spec.name}' gives no log-variance while it streams; encode without --logvar")
    opened = session()
    return (opened.push(chunk, moments=True) for chunk in chunks)

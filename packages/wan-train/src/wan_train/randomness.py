"""Random draws keyed by what they are for, not by who draws them or in which order: the same in every parallel layout."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

_WORDS = 624  # of a Mersenne Twister's state; torch stores each in 8 bytes, after a header of 24
_HEADER = 24
_DIGEST = hashlib.blake2b.MAX_DIGEST_SIZE


def generator(seed: int, step: int, sample: int, stream: str) -> torch.Generator:
    """A fresh CPU generator of one draw: same arguments, same numbers; other arguments, independent ones.

    seed, step, sample: of the run, the global step, and the index of the sample in the data set; ints of 0 or more
    stream: what is drawn, such as "noise", "sigma", "caption" or "drop"
    Raises ValueError where a number is negative or the stream has no name.
    """
    import torch

    made = torch.Generator()
    state = made.get_state()
    words = state.numpy()[_HEADER : _HEADER + 8 * _WORDS].view(np.uint64)
    # all words are set, since manual_seed of a CPU generator keeps only 32 bits: two of 100,000 draws would be the same
    words[:] = _words(seed, step, sample, stream)
    made.set_state(state)
    return made


def derived_seed(seed: int, step: int, sample: int, stream: str) -> int:
    """A seed of 63 bits for a generator that is not torch's; keyed as `generator` is."""
    return int.from_bytes(_digest(seed, step, sample, stream, 0)[:8], "little") >> 1


def _words(seed: int, step: int, sample: int, stream: str) -> np.ndarray:
    """uint32 words of a Mersenne Twister's state."""
    blocks = range(-(-4 * _WORDS // _DIGEST))
    data = b"".join(_digest(seed, step, sample, stream, block) for block in blocks)
    return np.frombuffer(data[: 4 * _WORDS], "<u4")


def _digest(seed: int, step: int, sample: int, stream: str, block: int) -> bytes:
    if min(seed, step, sample) < 0 or not stream:
        raise ValueError(f"seed, step and sample must be 0 or more, and a stream has a name: got {seed}, {step}, {sample}, {stream!r}")
    text = f"{seed} {step} {sample} {block} {stream}"  # the stream last, since it may hold blanks
    return hashlib.blake2b(text.encode(), digest_size=_DIGEST, person=b"wan-train 1").digest()

"""A text encoder without weights: the vector of a word is drawn from the word itself, and a last one ends the prompt."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from wan_text.tokenizer import Tokens

from .plugin import SPEC

END = "</s>"


class Words(torch.nn.Module):
    """Prompts to contexts `[L, 64]`, one row a word and one for the end; case and punctuation do not count."""

    spec = SPEC

    def tokenize(self, prompts: Sequence[str]) -> list[Tokens]:
        """Words as numbers; a longer prompt is cut, and its `count` says how long it was."""
        found = []
        for prompt in prompts:
            words = re.findall(r"\w+", prompt.lower())
            ids = [*map(_number, words[: self.spec.max_tokens - 1]), _number(END)]
            found.append(Tokens(tuple(ids), len(words) + 1))
        return found

    def fingerprint(self) -> str:
        """What the contexts depend on, for caches and manifests."""
        return hashlib.sha256(f"words/1 {self.spec.embed_dim}".encode()).hexdigest()

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        """One context a prompt; warns of those that are cut."""
        tokens = self.tokenize(prompts)
        if cut := sum(each.truncated for each in tokens):
            warnings.warn(f"{cut} of {len(tokens)} prompts have more than {self.spec.max_tokens} words and are cut", stacklevel=2)
        return [torch.stack([_vector(number, self.spec.embed_dim) for number in each.ids]) for each in tokens]


def _number(word: str) -> int:
    return int.from_bytes(hashlib.sha256(word.encode()).digest()[:7], "big")


@lru_cache(maxsize=10_000)
def _vector(number: int, width: int) -> Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(number))

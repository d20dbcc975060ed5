"""The text encoder as the backbones use it: prompts in, context tokens out, each at its true length."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from . import checkpoint
from ._shared.weights import Pretrained, State
from .config import UMT5Config
from .plugins import TextEncoderSpec
from .tokenizer import PAD, Tokenizer, Tokens, clean, cleaner_id, train_tokenizer
from .umt5 import UMT5Encoder

_PREFIX = "umt5."
_BUCKET = 16  # prompts whose lengths fall into one bucket of 16 tokens share a batch
_BATCH_TOKENS = 4096  # of a batch, padding included: 8 prompts of 512


class TextEncoder(Pretrained):
    """A umT5 encoder with its tokenizer.

    `from_pretrained` takes our folder, an official release, a Hugging Face or diffusers folder, or a file with
    `spiece.model` beside it.

    spiece: the bytes of the sentencepiece model

    Example: `load_text_encoder("tiny").encode(["a red circle", ""])` is a list of two tensors, `[L, 96]` and `[1, 96]`.
    """

    format: ClassVar[str] = checkpoint.FORMAT
    hub_files = checkpoint.HUB_FILES

    def __init__(self, config: UMT5Config, spiece: bytes) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = checkpoint.make_tokenizer(config, spiece)
        self.umt5 = UMT5Encoder(config)

    @property
    def spec(self) -> TextEncoderSpec:
        """Width, length and embedding space of what `encode` returns."""
        return checkpoint.spec_of(self.config, self.name or self.config.embedding_space)

    @property
    def cleaner(self) -> str:
        """Names how prompts are cleaned, the version of ftfy included."""
        return cleaner_id(self.config.cleaning)

    def encode(self, prompts: Iterable[str]) -> list[Tensor]:
        """One context `[L_i, D]` a prompt, its `</s>` included, without pad rows and without gradients.

        Every different prompt is encoded once, in batches of similar length; a cut prompt is warned of.
        """
        with torch.no_grad():
            return self.embed(prompts)

    def embed(self, prompts: Iterable[str]) -> list[Tensor]:
        """What `encode` returns, with gradients, to train the encoder together with a backbone."""
        tokens = self.tokenize(prompts)
        hidden: dict[tuple[int, ...], Tensor] = {}
        for batch in length_batches({prompt.ids for prompt in tokens}):
            hidden.update(zip(batch, self._embed(batch), strict=True))
        return [hidden[prompt.ids] for prompt in tokens]

    def _embed(self, batch: list[tuple[int, ...]]) -> list[Tensor]:
        lengths = [len(ids) for ids in batch]
        ids = torch.tensor([[*ids, *[PAD] * (lengths[-1] - len(ids))] for ids in batch], device=self.umt5.token_embedding.weight.device)
        if lengths[0] == lengths[-1]:
            return list(self(ids))
        mask = torch.arange(lengths[-1]) < torch.tensor(lengths)[:, None]
        return [row[:length] for row, length in zip(self(ids, mask.to(ids.device)), lengths, strict=True)]

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Hidden states `[B, L, D]`, pad rows included; ids and mask (nonzero where real, None: all) are `[B, L]`."""
        return self.umt5(ids, mask)

    def tokenize(self, prompts: Iterable[str]) -> list[Tokens]:
        """Ids, token count and whether it was cut, for every prompt."""
        return self.tokenizer.tokenize(prompts)

    @classmethod
    def make(cls, config: UMT5Config, path: Path) -> Self:
        return cls(config, checkpoint.read_spiece(path))

    def reinitialised(self, **architecture: Any) -> Self:
        """A new encoder with fresh weights and this one's tokenizer, with the fields in `architecture` changed."""
        return type(self)(UMT5Config(**{**self.config.model_dump(), **architecture}), self.tokenizer.model)

    def retokenised(self, lines: Iterable[str], pieces: int) -> Self:
        """A new encoder with fresh weights and a BPE tokenizer of at most `pieces` pieces, trained on the cleaned `lines`."""
        spiece = train_tokenizer((clean(line, self.config.cleaning) for line in lines), pieces, "bpe", normalization="identity")
        return type(self)(UMT5Config(**{**self.config.model_dump(), "vocab_size": Tokenizer(spiece).vocab_size}), spiece)

    @classmethod
    def read_checkpoint(cls, path: Path) -> tuple[UMT5Config, State]:
        """Config and tensors, in own names, of any layout that `checkpoint.read_encoder` knows."""
        config, state = checkpoint.read_encoder(path)
        return config, {_PREFIX + key: value for key, value in state.items()}

    @classmethod
    def official_names(cls, config: UMT5Config) -> dict[str, str]:
        return {_PREFIX + own: official for own, official in checkpoint.official_names(config).items()}

    def extra_files(self) -> dict[str, bytes]:
        """The tokenizer, which `save_pretrained` writes beside the weights."""
        return {"spiece.model": self.tokenizer.model}

    def fingerprint(self) -> str:
        """sha256 of all that decides what a prompt becomes but the cleaner: weights, tokenizer, length limit, unknown characters."""
        digest = hashlib.sha256(super().fingerprint().encode())
        digest.update(f" {self.config.max_tokens} {self.config.unknown} {self.config.max_distance} ".encode())
        digest.update(self.tokenizer.model)
        return digest.hexdigest()


def length_batches(prompts: Iterable[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
    """Ids sorted by length and cut into batches of one length bucket and at most `_BATCH_TOKENS` padded tokens."""
    batch: list[tuple[int, ...]] = []
    for ids in sorted(prompts, key=lambda ids: (len(ids), ids)):
        if batch and ((len(ids) - 1) // _BUCKET != (len(batch[0]) - 1) // _BUCKET or (len(batch) + 1) * len(ids) > _BATCH_TOKENS):
            yield batch
            batch = []
        batch.append(ids)
    if batch:
        yield batch

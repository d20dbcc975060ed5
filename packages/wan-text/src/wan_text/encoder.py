"""The text encoder as the backbones use it: prompts in, context tokens out, each at its true length."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from . import checkpoint
from ._shared.packed import PackedState, kinds
from ._shared.quantised import build_quantised, packed_state
from ._shared.weights import Pretrained, build, default_dtype, fingerprint, locate
from .config import UMT5Config
from .layouts import official_names
from .plugins import TextEncoderSpec
from .tokenizer import PAD, Tokenizer, Tokens, clean, cleaner_id, train_tokenizer
from .umt5 import UMT5Encoder

_PREFIX = "umt5."
_BUCKET = 16  # prompts whose lengths fall into one bucket of 16 tokens share a batch
_BATCH_TOKENS = 4096  # of a batch, padding included: 8 prompts of 512


class PromptEncoder:
    """What text encoders around one tokenizer share: prompts to ids to batches of similar length, each different one once."""

    config: UMT5Config
    tokenizer: Tokenizer
    name: str | None = None

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
        """What `encode` returns, with gradients where the encoder has them, to train it together with a backbone."""
        tokens = self.tokenize(prompts)
        batches = list(length_batches({prompt.ids for prompt in tokens}))
        hidden: dict[tuple[int, ...], Tensor] = {}
        for batch, rows in zip(batches, self.hidden(map(padded, batches)), strict=True):
            hidden.update((ids, row[: len(ids)]) for ids, row in zip(batch, rows, strict=True))
        return [hidden[prompt.ids] for prompt in tokens]

    def hidden(self, batches: Iterable[tuple[Tensor, Tensor | None]]) -> Iterable[Tensor]:
        """Hidden states `[B, L, D]` of batches of ids and mask, both `[B, L]`; mask None: all are real."""
        raise NotImplementedError

    def tokenize(self, prompts: Iterable[str]) -> list[Tokens]:
        """Ids, token count and whether it was cut, for every prompt."""
        return self.tokenizer.tokenize(prompts)

    def identity(self, weights: str) -> str:
        """sha256 of all that decides what a prompt becomes but the cleaner: weights, tokenizer, length limit, unknown characters."""
        digest = hashlib.sha256(weights.encode())
        digest.update(f" {self.config.max_tokens} {self.config.unknown} {self.config.max_distance} ".encode())
        digest.update(self.tokenizer.model)
        return digest.hexdigest()


class TextEncoder(PromptEncoder, Pretrained):
    """A umT5 encoder with its tokenizer.

    `from_pretrained` takes our folder, an official release, a Hugging Face or diffusers folder, or a file (safetensors, .pth,
    GGUF) that holds the tokenizer or has `spiece.model` beside it.

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

    def hidden(self, batches: Iterable[tuple[Tensor, Tensor | None]]) -> Iterable[Tensor]:
        device = self.umt5.token_embedding.weight.device
        return (self(ids.to(device), None if mask is None else mask.to(device)) for ids, mask in batches)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Hidden states `[B, L, D]`, pad rows included; ids and mask (nonzero where real, None: all) are `[B, L]`."""
        return self.umt5(ids, mask)

    @classmethod
    def from_pretrained(
        cls, source: str | os.PathLike[str], *, dtype: Any = None, device: Any = None, quantise: Literal["int8"] | None = None
    ) -> Self:
        """Load a folder, a file or a Hub id in any layout.

        dtype None is fp32 on a CPU and the checkpoint's own on a GPU (bf16 where that is fp32); device None is the CPU.
        quantise: "int8" keeps the products' weights as int8 with a scale a row, a quarter of fp32 and 2 to 3 % off; what was
        saved so stays so. Weights in fp8 and GGUF are computed with in `dtype`.
        """
        path = locate(source, cls.hub_files)
        config, state = cls.read_checkpoint(path)
        dtype = dtype or default_dtype(state, torch.device(device or "cpu"))
        if not quantise and "int8" not in kinds(state):
            return build(lambda: cls.make(config, path), state, dtype=dtype, device=device, source=path)
        return build_quantised(lambda: cls.make(config, path), state, "umt5", "int8", dtype=dtype, device=device, source=path)

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
    def read_checkpoint(cls, path: Path) -> tuple[UMT5Config, PackedState]:
        """Config and tensors, in own names, of any layout that `checkpoint.read_encoder` knows."""
        config, state = checkpoint.read_encoder(path)
        return config, {_PREFIX + key: value for key, value in state.items()}

    @classmethod
    def official_names(cls, config: UMT5Config) -> dict[str, str]:
        names = {_PREFIX + own: official for own, official in official_names(config).items()}
        return names | {f"{own}_scale": f"{official}_scale" for own, official in names.items()}

    def extra_files(self) -> dict[str, bytes]:
        """The tokenizer, which `save_pretrained` writes beside the weights."""
        return {"spiece.model": self.tokenizer.model}

    def fingerprint(self) -> str:
        """sha256 of all that decides what a prompt becomes but the cleaner."""
        state, names = packed_state(self.state_dict()), self.official_names(self.config)
        dtype = self.umt5.token_embedding.weight.dtype if kinds(state) else None
        return self.identity(fingerprint({names[key]: value for key, value in state.items()}, dtype))


def padded(batch: list[tuple[int, ...]]) -> tuple[Tensor, Tensor | None]:
    """Ids of a batch, shortest first, padded to the longest, and a mask of the real ones; None where all are as long."""
    lengths = [len(ids) for ids in batch]
    ids = torch.tensor([[*ids, *[PAD] * (lengths[-1] - len(ids))] for ids in batch])
    return ids, None if lengths[0] == lengths[-1] else torch.arange(lengths[-1]) < torch.tensor(lengths)[:, None]


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

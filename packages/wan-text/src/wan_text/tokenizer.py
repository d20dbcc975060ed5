"""Prompt to ids: the cleaning of wan/modules/tokenizers.py and a sentencepiece model with umT5's special ids."""

from __future__ import annotations

import html
import io
import os
import re
import string
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import ftfy
import sentencepiece

Cleaning = Literal["whitespace", "lower", "canonicalize"]
PAD, END, START, UNKNOWN = 0, 1, 2, 3

# Unicode White_Space: `\s` of the module `regex`, which the reference uses; `\s` of `re` has U+001C..U+001F besides
_SPACES = re.compile("[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def clean(text: str, mode: Cleaning = "whitespace") -> str:
    """A prompt as the encoder was trained on it.

    whitespace (Wan's mode): ftfy, HTML unescaped twice, every run of white space one space, ends stripped
    lower: the same, lower-cased
    canonicalize: underscores to spaces, ASCII punctuation removed, lower-cased

    Example: `clean(" a  \u201ccat\u201d ")` is `'a "cat"'`.
    """
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    if mode == "canonicalize":
        text = text.replace("_", " ").translate(_NO_PUNCTUATION)
    text = _SPACES.sub(" ", text).strip()
    return text if mode == "whitespace" else text.lower()


def cleaner_id(mode: Cleaning) -> str:
    """Names the cleaning in files: the mode and the version of ftfy, on which the result depends."""
    return f"{mode}/ftfy-{version('ftfy')}"


@dataclass(frozen=True)
class Tokens:
    """A tokenized prompt.

    ids: at most `max_tokens`, the last one `</s>`
    count: ids before truncation
    """

    ids: tuple[int, ...]
    count: int

    @property
    def truncated(self) -> bool:
        return self.count > len(self.ids)


class Tokenizer:
    """A sentencepiece model, read from its bytes or its file.

    max_tokens: longest list of ids, `</s>` included
    unknown: characters outside the vocabulary become byte pieces (lossless) or one `<unk>` a run
    cleaning: mode of `clean`
    Raises ValueError where the bytes are no sentencepiece model or the special ids are not umT5's.
    """

    def __init__(
        self,
        model: bytes | str | os.PathLike[str],
        max_tokens: int = 512,
        unknown: Literal["bytes", "unk"] = "bytes",
        cleaning: Cleaning = "whitespace",
    ) -> None:
        self.model = model if isinstance(model, bytes) else Path(model).read_bytes()
        self.max_tokens, self.unknown, self.cleaning = max_tokens, unknown, cleaning
        source = "these bytes" if isinstance(model, bytes) else f"'{model}'"
        self._pieces = sentencepiece.SentencePieceProcessor()
        try:
            self._pieces.LoadFromSerializedProto(self.model)
        except RuntimeError as error:
            raise ValueError(f"{source} is not a sentencepiece model: {error}") from error
        special = (self._pieces.pad_id(), self._pieces.eos_id(), self._pieces.unk_id())
        if special != (PAD, END, UNKNOWN):
            raise ValueError(f"{source} has pad, </s>, <unk> = {special}, expected umT5's {(PAD, END, UNKNOWN)}")

    @property
    def vocab_size(self) -> int:
        """Number of pieces."""
        return int(self._pieces.get_piece_size())

    def tokenize(self, prompts: Iterable[str]) -> list[Tokens]:
        """Clean and tokenize; a prompt longer than `max_tokens` is cut, keeps its `</s>`, and is warned of."""
        if isinstance(prompts, str):
            raise ValueError(f"expected a list of prompts, got the string '{prompts[:40]}': pass [prompt]")
        return [self._tokenize(prompt) for prompt in prompts]

    def _tokenize(self, prompt: str) -> Tokens:
        text = clean(prompt, self.cleaning)
        ids = self._pieces.encode(text, out_type=int)
        if self.unknown == "unk":
            ids = self._without_bytes(ids)
        count = len(ids) + 1
        if count > self.max_tokens:
            text = text if len(text) <= 40 else f"{text[:40]}..."
            warnings.warn(
                f"the prompt '{text}' has {count} tokens, this encoder takes {self.max_tokens}: the rest was cut off", stacklevel=4
            )
        return Tokens((*ids[: self.max_tokens - 1], END), count)

    def _without_bytes(self, ids: list[int]) -> list[int]:
        plain = [UNKNOWN if self._pieces.is_byte(i) else i for i in ids]
        return [now for before, now in zip([None, *plain], plain, strict=False) if not now == before == UNKNOWN]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special ids have none."""
        return str(self._pieces.decode(list(ids)))

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """The piece behind every id."""
        return [self._pieces.id_to_piece(i) for i in ids]


def train_tokenizer(
    lines: Iterable[str],
    vocab_size: int,
    model_type: Literal["unigram", "bpe"] = "unigram",
    *,
    normalization: Literal["nmt_nfkc", "identity"] = "nmt_nfkc",
) -> bytes:
    """Train a small sentencepiece model with umT5's special ids and byte fallback; the same lines give the same bytes.

    vocab_size: an upper bound, of which 260 pieces are special ones and bytes
    normalization: `identity` leaves out the Unicode table and makes a file of a few kB instead of 240
    Raises ValueError where `vocab_size` is too small for the characters of `lines`.
    """
    out = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=out,
            vocab_size=vocab_size,
            model_type=model_type,
            pad_id=PAD,
            eos_id=END,
            bos_id=START,
            unk_id=UNKNOWN,
            pad_piece="<pad>",
            eos_piece="</s>",
            bos_piece="<s>",
            unk_piece="<unk>",
            byte_fallback=True,
            character_coverage=1.0,
            hard_vocab_limit=False,
            normalization_rule_name=normalization,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(f"no tokenizer of {vocab_size} pieces from these lines: {error}") from error
    return out.getvalue()

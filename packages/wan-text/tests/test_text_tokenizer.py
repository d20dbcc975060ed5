"""Cleaning and ids: umT5's special ids, byte fallback, truncation that says so."""

from __future__ import annotations

import json
import warnings
from itertools import pairwise
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from wan_text import Tokenizer
from wan_text.tokenizer import clean, train_tokenizer

LINES = [f"a {colour} {shape} moves {way}" for colour in ("red", "blue") for shape in ("circle", "star") for way in ("left", "right", "up")]
SPIECE = train_tokenizer(LINES * 3, 400, "unigram")
PIECES = sentencepiece.SentencePieceProcessor(model_proto=SPIECE)


def ids(tokenizer: Tokenizer, prompt: str) -> tuple[int, ...]:
    return tokenizer.tokenize([prompt])[0].ids


def test_training_is_deterministic_and_gives_umt5s_special_ids() -> None:
    assert train_tokenizer(LINES * 3, 400, "unigram") == SPIECE
    assert [PIECES.id_to_piece(i) for i in range(5)] == ["<pad>", "</s>", "<s>", "<unk>", "<0x00>"]
    small = train_tokenizer(LINES * 3, 330, "bpe", normalization="identity")
    assert len(small) < 10_000 < len(SPIECE)
    assert ids(Tokenizer(small), "a red circle")[-1] == 1


def test_a_vocabulary_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match="no tokenizer of 100 pieces"):
        train_tokenizer(LINES, 100)


def test_the_empty_prompt_is_one_token() -> None:
    tokenizer = Tokenizer(SPIECE)
    assert ids(tokenizer, "") == ids(tokenizer, " \n\t") == (1,)


def test_control_pieces_typed_in_a_prompt_are_text() -> None:
    tokenizer = Tokenizer(SPIECE)
    for prompt in ("a </s> b", "<pad>", "<unk> <s>"):
        assert 1 not in ids(tokenizer, prompt)[:-1]
        assert not {0, 2, 3} & set(ids(tokenizer, prompt))
        assert tokenizer.decode(ids(tokenizer, prompt)) == prompt


def test_unknown_characters_become_bytes_or_one_unknown_a_run() -> None:
    prompt = "a 猫🐱 circle ñ"
    as_bytes, as_unknown = Tokenizer(SPIECE), Tokenizer(SPIECE, unknown="unk")
    assert as_bytes.decode(ids(as_bytes, prompt)) == prompt
    assert "<0xF0>" in as_bytes.pieces(ids(as_bytes, prompt))
    assert 3 not in ids(as_bytes, prompt)
    assert ids(as_unknown, prompt).count(3) == 2
    assert as_unknown.pieces(ids(as_unknown, "猫🐱")) == ["▁", "<unk>", "</s>"]
    assert ids(as_bytes, LINES[0]) == ids(as_unknown, LINES[0])


def test_truncation_keeps_the_end_and_warns_with_the_numbers() -> None:
    tokenizer = Tokenizer(SPIECE, max_tokens=8)
    with pytest.warns(UserWarning, match=r"has 30001 tokens, this encoder takes 8"):
        (tokens,) = tokenizer.tokenize(["red " * 10_000])
    assert len(tokens.ids) == 8
    assert tokens.ids[-1] == 1
    assert tokens.truncated
    assert tokens.count == 30_001
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (fits,) = Tokenizer(SPIECE, max_tokens=7).tokenize(["red red"])
    assert (len(fits.ids), fits.count, fits.truncated) == (7, 7, False)


def test_ids_equal_transformers_within_the_vocabulary(tmp_path: Path) -> None:
    from transformers import T5Tokenizer

    (tmp_path / "spiece.model").write_bytes(SPIECE)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer", "extra_ids": 0}))
    theirs, ours = T5Tokenizer.from_pretrained(tmp_path, extra_ids=0), Tokenizer(SPIECE)
    for line in [*LINES, "a red circle", ""]:
        assert list(ids(ours, line)) == theirs(line).input_ids


def test_not_a_model_and_other_special_ids_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="these bytes is not a sentencepiece model"):
        Tokenizer(b"nonsense")
    (tmp_path / "spiece.model").write_bytes(b"")
    with pytest.raises(ValueError, match=r"spiece\.model"):
        Tokenizer(tmp_path / "spiece.model")
    with pytest.raises(FileNotFoundError):
        Tokenizer(tmp_path / "missing.model")
    with pytest.raises(ValueError, match="expected a list of prompts"):
        Tokenizer(SPIECE).tokenize("a red circle")


@given(st.text())
def test_any_text_gives_sentencepieces_ids_and_the_end(prompt: str) -> None:
    tokenizer = Tokenizer(SPIECE, max_tokens=10_000)
    expected = PIECES.encode(clean(prompt), out_type=int)
    assert list(ids(tokenizer, prompt)) == [*expected, 1]
    assert not {0, 1, 2, 3} & set(expected)


@given(st.text(max_size=60), st.integers(1, 12))
def test_truncation_is_a_prefix_of_the_full_ids(prompt: str, limit: int) -> None:
    (full,) = Tokenizer(SPIECE, max_tokens=10_000).tokenize([prompt])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        (cut,) = Tokenizer(SPIECE, max_tokens=limit).tokenize([prompt])
    assert cut.ids == (*full.ids[:-1][: limit - 1], 1)
    assert cut.truncated == bool(caught) == (len(full.ids) > limit)


@given(st.text())
def test_cleaning_leaves_single_spaces_and_no_ends(prompt: str) -> None:
    text = clean(prompt)
    assert text == text.strip()
    assert "  " not in text
    assert not set("\t\n\r\x0b\x0c\x85\u00a0\u2003\u2028\u3000") & set(text)
    assert clean(prompt, "lower") == text.lower()
    text.encode()


JOINED = "\u200d\u200b\ufeff\u0301\U0001f468\U0001f469\u2764\ufe0f"
ODD = st.text(st.sampled_from(f"a <>/s&;{JOINED}\u202e\u0645\u05d0\x00\x07\x1c\xa0\u3000\uff21\ufb01\u201c\u2019\xc3\xa9"))
ESCAPES = ("&amp;", "&amp;amp;", "&lt;", "&#x41;", "&nbsp;", "&quot", "<0x41>", "<extra_id_0>", "\u2581", " ")
ENTITIES = st.lists(st.sampled_from(ESCAPES)).map("".join)
ANYTHING = st.one_of(st.text(), ODD, ENTITIES)


@given(ANYTHING)
def test_bytes_lose_nothing_that_sentencepiece_normalises_to(prompt: str) -> None:
    tokenizer = Tokenizer(SPIECE, max_tokens=10_000)
    normalised = PIECES.normalize(clean(prompt)).replace("\u2581", " ").strip()
    assert tokenizer.decode(ids(tokenizer, prompt)).strip() == normalised
    assert all(0 <= i < tokenizer.vocab_size for i in ids(tokenizer, prompt))


@given(ANYTHING)
def test_unknowns_are_fused_and_no_bytes_remain(prompt: str) -> None:
    as_unknown, as_bytes = ids(Tokenizer(SPIECE, 10_000, "unk"), prompt), ids(Tokenizer(SPIECE, 10_000), prompt)
    assert not any(PIECES.is_byte(i) for i in as_unknown)
    assert (3, 3) not in pairwise(as_unknown)
    assert (3 in as_unknown) == any(PIECES.is_byte(i) for i in as_bytes)


@given(ANYTHING)
def test_cleaning_settles_but_for_entities(prompt: str) -> None:
    """Every pass unescapes twice, as the reference does: what was escaped more often than that changes again."""
    once = clean(prompt)
    assert clean(once) == once or "&" in once
    for mode in ("lower", "canonicalize"):
        assert clean(prompt, mode) == clean(prompt, mode).lower()


def test_half_a_character_is_left_out() -> None:
    """ftfy makes it U+FFFD, which sentencepiece's normalisation takes for a space."""
    tokenizer = Tokenizer(SPIECE)
    assert tokenizer.decode(ids(tokenizer, "red \ud83d circle")) == "red circle"

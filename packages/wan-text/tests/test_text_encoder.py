"""Prompts to contexts: true lengths, buckets, duplicates, gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from wan_text import TextEncoder, load_text_encoder
from wan_text.encoder import length_batches
from wan_text.testing import difference

CAPTIONS = (
    "a red circle moves left against a black background",
    "the green square goes right with a white background",
    "an orange triangle that moves up to the left",
    "still purple star staying still standing stands stays",
    "yellow blue in is moving on down upward downward",
)
WORDS = st.lists(st.sampled_from(["a", "red", "blue", "circle", "moves", "left", "猫", ""]), max_size=20).map(" ".join)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompts=st.lists(WORDS, max_size=6))
def test_a_batch_equals_single_prompts_in_order(encoder: TextEncoder, prompts: list[str]) -> None:
    contexts = encoder.encode(prompts)
    assert len(contexts) == len(prompts)
    for prompt, context, tokens in zip(prompts, contexts, encoder.tokenize(prompts), strict=True):
        assert context.shape == (len(tokens.ids), 24)
        assert difference(context, encoder.encode([prompt])[0]) <= 2e-6


@given(st.lists(st.integers(1, 512)))
def test_batches_hold_every_prompt_once_and_little_padding(lengths: list[int]) -> None:
    prompts = {(*range(i, i + length - 1), 1) for i, length in enumerate(lengths)}
    batches = list(length_batches(prompts))
    assert sorted(ids for batch in batches for ids in batch) == sorted(prompts)
    for batch in batches:
        assert batch == sorted(batch, key=len)
        assert len(batch[-1]) - len(batch[0]) < 16
        assert len(batch) * len(batch[-1]) <= 4096


def test_duplicates_are_encoded_once_and_rows_are_true_lengths(encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    forward = encoder.umt5.forward

    def counted(ids: Tensor, mask: Tensor | None = None) -> Tensor:
        seen.append(tuple(ids.shape))
        return forward(ids, mask)

    monkeypatch.setattr(encoder.umt5, "forward", counted)
    negative = "a blue star moves right " * 4
    prompts = ["red", negative, "a  red circle", negative, "red", "a red circle", ""]
    contexts = encoder.encode(prompts)
    longest = len(contexts[1])
    assert longest > 17
    assert seen == [(3, len(contexts[2])), (1, longest)]
    assert torch.equal(contexts[1], contexts[3])
    assert torch.equal(contexts[2], contexts[5])


def test_equal_to_the_padded_encoding_of_the_reference(encoder: TextEncoder) -> None:
    prompts = ["a red circle moves left", "", "blue star"]
    ids = torch.zeros(3, 128, dtype=torch.long)
    for row, tokens in zip(ids, encoder.tokenize(prompts), strict=True):
        row[: len(tokens.ids)] = torch.tensor(tokens.ids)
    with torch.no_grad():
        padded = encoder(ids, ids != 0)
    for row, context in zip(padded, encoder.encode(prompts), strict=True):
        assert difference(context, row[: len(context)]) <= 2e-6


def test_embed_trains_and_encode_does_not(encoder: TextEncoder) -> None:
    with torch.inference_mode():
        encoder.encode(["a red circle"])  # fills the cache of position buckets, which training uses next
    assert not encoder.encode(["a red circle"])[0].requires_grad
    contexts = encoder.embed(["a red circle", "blue", "a red circle"])
    torch.stack([context.square().sum() for context in contexts]).sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
    for context, expected in zip(contexts, encoder.encode(["a red circle", "blue", "a red circle"]), strict=True):
        assert difference(context.detach(), expected) <= 2e-6


def test_spec_and_fingerprint_say_what_a_prompt_becomes(encoder: TextEncoder, config: object, spiece: bytes) -> None:
    assert (encoder.spec.embed_dim, encoder.spec.max_tokens, encoder.spec.embedding_space) == (24, 128, "test-1")
    first, twin = encoder.fingerprint(), copy.deepcopy(encoder)
    assert twin.fingerprint() == first
    with torch.no_grad():
        twin.umt5.norm.weight[0] += 1
    assert twin.fingerprint() != first
    unknown = TextEncoder(encoder.config.model_copy(update={"unknown": "unk"}), spiece)
    unknown.load_state_dict(encoder.state_dict())
    assert unknown.fingerprint() != first


def test_reinitialised_has_fresh_weights_and_the_same_tokenizer(encoder: TextEncoder) -> None:
    fresh = encoder.reinitialised(num_layers=1)
    assert fresh.config == encoder.config.model_copy(update={"num_layers": 1})
    assert fresh.tokenizer.model == encoder.tokenizer.model
    assert not torch.equal(fresh.umt5.token_embedding.weight, encoder.umt5.token_embedding.weight)
    with pytest.raises(ValueError, match="layers"):
        encoder.reinitialised(layers=3)


def test_more_pieces_than_embeddings_are_refused(encoder: TextEncoder, spiece: bytes) -> None:
    pieces = encoder.tokenizer.vocab_size
    with pytest.raises(ValueError, match=f"{pieces} pieces, the encoder 270 embeddings"):
        TextEncoder(encoder.config.model_copy(update={"vocab_size": 270}), spiece)


def test_the_built_in_encoder_knows_every_caption_word_as_one_piece() -> None:
    tiny = load_text_encoder("tiny")
    words = [word for line in CAPTIONS for word in line.split()]
    assert [word for word in words if len(tiny.tokenize([word])[0].ids) != 2] == []
    lower, capital, full_stop = tiny.encode(["a red circle moves left", "A Red circle  moves LEFT", "a red circle moves left."])
    assert torch.equal(lower, capital)
    assert len(full_stop) == len(lower) + 1 == 7
    assert tiny.spec.embedding_space == "tiny-2"
    assert not tiny.training

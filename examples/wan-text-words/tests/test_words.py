"""The conformance kit of wan-text, and what is particular to vectors of words."""

from __future__ import annotations

import torch
from wan_text.testing import TextEncoderContract
from wan_text_words.encoder import Words


class TestWords(TextEncoderContract):
    plugin = "words"


def test_a_word_is_the_same_vector_wherever_it_stands() -> None:
    first, second = Words().encode(["Red circle", "a circle in red."])
    assert torch.equal(first[0], second[3])
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[0], first[1])

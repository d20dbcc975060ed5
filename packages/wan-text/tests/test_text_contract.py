"""The conformance kit passes good encoders and fails broken ones."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from wan_text import TextEncoder, load_text_encoder
from wan_text.testing import TextEncoderContract


class TestTiny(TextEncoderContract):
    plugin = "tiny"


class TestFactory(TextEncoderContract):
    """An encoder that is not registered is given by overriding the fixture."""

    @pytest.fixture(scope="class")
    @classmethod
    def encoder(cls, config: Any, spiece: bytes) -> TextEncoder:
        return TextEncoder(config, spiece).eval()


class Broken:
    """The tiny encoder with one method replaced."""

    def __init__(self, change: Callable[[list[Tensor]], list[Tensor]]) -> None:
        self.inner, self.change, self.spec = load_text_encoder("tiny"), change, load_text_encoder("tiny").spec

    def encode(self, prompts: Iterable[str]) -> list[Tensor]:
        return self.change(self.inner.encode(prompts))

    def tokenize(self, prompts: Iterable[str]) -> Any:
        return self.inner.tokenize(prompts)


class Silent(Broken):
    """Cuts without a word."""

    def encode(self, prompts: Iterable[str]) -> list[Tensor]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return super().encode(prompts)


def padded(contexts: list[Tensor]) -> list[Tensor]:
    return [F.pad(context, (0, 0, 0, 32 - len(context))) for context in contexts]


def mixed_up(contexts: list[Tensor]) -> list[Tensor]:
    mean = torch.stack([context.mean() for context in contexts]).mean() if contexts else 0
    return [context + mean for context in contexts]


def without_lone_rows(contexts: list[Tensor]) -> list[Tensor]:
    return [context if len(context) > 1 else context[:0] for context in contexts]


def same(contexts: list[Tensor]) -> list[Tensor]:
    return contexts


@pytest.mark.parametrize(
    ("encoder", "test"),
    [
        (Broken(padded), "test_no_pad_rows"),
        (Broken(mixed_up), "test_a_batch_equals_single_prompts"),
        (Broken(lambda contexts: contexts[::-1]), "test_one_context_a_prompt_in_their_order"),
        (Broken(lambda contexts: contexts[:-1]), "test_one_context_a_prompt_in_their_order"),
        (Broken(lambda contexts: [context[:, 1:] for context in contexts]), "test_spec_describes_the_encoder"),
        (Broken(without_lone_rows), "test_the_empty_prompt_has_a_context"),
        (Broken(lambda contexts: [context.requires_grad_() for context in contexts]), "test_contexts_carry_no_gradient_and_repeat"),
        (Broken(lambda contexts: [context + torch.rand(1) for context in contexts]), "test_contexts_carry_no_gradient_and_repeat"),
        (Silent(same), "test_a_long_prompt_is_cut_and_reported"),
    ],
)
def test_a_broken_encoder_fails(encoder: Broken, test: str) -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        getattr(TestTiny(), test)(encoder)


def test_the_wrapper_alone_passes() -> None:
    kit = TestTiny()
    for name in dir(kit):
        if name.startswith("test_"):
            getattr(kit, name)(Broken(same))

"""Conformance kits of text and image encoders, as plain pytest classes: subclass one, name your plugin, run pytest.

Example:
    >>> class TestMine(TextEncoderContract):
    ...     plugin = "my-encoder"
"""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from .plugins import find_image_encoder, find_text_encoder


def difference(got: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over max(1, largest absolute value)."""
    return float((got - expected).abs().max() / expected.abs().max().clamp(min=1))


class TextEncoderContract:
    """What every text encoder must do. `plugin` is a name, path or import string; or override `encoder`.

    prompts: short to long, words the encoder knows, none of them cut
    tolerance: on `difference`, in fp32 on a CPU
    """

    plugin: ClassVar[str]
    prompts: ClassVar[tuple[str, ...]] = ("red", "a red circle", "a red circle that moves to the left on a white background")
    tolerance: ClassVar[float] = 1e-5

    @pytest.fixture(scope="class")
    @classmethod
    def encoder(cls) -> Any:
        return find_text_encoder(cls.plugin).load(dtype=torch.float32)

    def too_long(self, encoder: Any) -> str:
        """A prompt with more tokens than fit."""
        return " ".join([self.prompts[-1]] * encoder.spec.max_tokens)

    def test_spec_describes_the_encoder(self, encoder: Any) -> None:
        spec = encoder.spec
        assert spec.embedding_space
        assert encoder.encode([self.prompts[0]])[0].shape[1] == spec.embed_dim
        if getattr(self, "plugin", None):
            listed = find_text_encoder(self.plugin)
            for name in ("embedding_space", "embed_dim", "max_tokens"):
                assert getattr(spec, name) == getattr(listed, name), f"{name}: the listed spec and the encoder's differ"

    def test_one_context_a_prompt_in_their_order(self, encoder: Any) -> None:
        mixed = [self.prompts[2], self.prompts[0], self.prompts[2], self.prompts[1], self.prompts[0]]
        contexts = encoder.encode(mixed)
        assert isinstance(contexts, list)
        assert len(contexts) == len(mixed), "expected one context a prompt"
        assert encoder.encode([]) == []
        assert [len(context) for context in contexts] == [len(encoder.encode([prompt])[0]) for prompt in mixed]
        assert torch.equal(contexts[0], contexts[2]), "the same prompt must give the same context"

    def test_no_pad_rows(self, encoder: Any) -> None:
        lengths = [len(context) for context in encoder.encode(list(self.prompts))]
        assert lengths == sorted(set(lengths)), f"prompts of growing length gave {lengths} rows: contexts must not be padded"
        assert lengths == [len(tokens.ids) for tokens in encoder.tokenize(list(self.prompts))], "expected one row a token"

    def test_a_batch_equals_single_prompts(self, encoder: Any) -> None:
        for prompt, context in zip(self.prompts, encoder.encode(list(self.prompts)), strict=True):
            assert difference(context, encoder.encode([prompt])[0]) <= self.tolerance, f"'{prompt}' depends on the rest of its batch"

    def test_the_empty_prompt_has_a_context(self, encoder: Any) -> None:
        (context,) = encoder.encode([""])
        assert 1 <= len(context) <= len(encoder.encode([self.prompts[0]])[0])
        assert context.isfinite().all()

    def test_a_long_prompt_is_cut_and_reported(self, encoder: Any) -> None:
        with pytest.warns(UserWarning, match=str(encoder.spec.max_tokens)):
            (context,) = encoder.encode([self.too_long(encoder)])
        assert len(context) <= encoder.spec.max_tokens
        with warnings.catch_warnings(record=True):
            warnings.simplefilter("always")
            (tokens,) = encoder.tokenize([self.too_long(encoder)])
        assert tokens.truncated
        assert tokens.count > encoder.spec.max_tokens
        assert not any(tokens.truncated for tokens in encoder.tokenize(list(self.prompts)))

    def test_contexts_carry_no_gradient_and_repeat(self, encoder: Any) -> None:
        first, second = encoder.encode([self.prompts[1]])[0], encoder.encode([self.prompts[1]])[0]
        assert not first.requires_grad
        assert torch.equal(first, second)
        assert first.is_floating_point()
        assert first.isfinite().all()


class ImageEncoderContract:
    """What every encoder of reference images must do. `plugin` is a name, path or import string; or override `encoder`.

    tolerance: on `difference`, in fp32 on a CPU
    """

    plugin: ClassVar[str]
    tolerance: ClassVar[float] = 1e-5

    @pytest.fixture(scope="class")
    @classmethod
    def encoder(cls) -> Any:
        return find_image_encoder(cls.plugin).load(dtype=torch.float32)

    def images(self) -> Tensor:
        """Three different ones."""
        return torch.rand(3, 3, 40, 60, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def test_spec_describes_the_encoder(self, encoder: Any) -> None:
        spec, tokens = encoder.spec, encoder.encode(self.images())
        assert spec.image_space
        assert tokens.shape == (3, spec.tokens, spec.image_dim)
        if getattr(self, "plugin", None):
            listed = find_image_encoder(self.plugin)
            for name in ("image_space", "image_dim", "tokens"):
                assert getattr(spec, name) == getattr(listed, name), f"{name}: the listed spec and the encoder's differ"

    def test_a_batch_equals_single_images(self, encoder: Any) -> None:
        images = self.images()
        for image, tokens in zip(images, encoder.encode(images), strict=True):
            assert difference(tokens, encoder.encode([image])[0]) <= self.tolerance, "an image depends on the rest of its batch"

    def test_images_of_several_sizes(self, encoder: Any) -> None:
        images = [self.images()[0], self.images()[1][:, :30, :20]]
        assert encoder.encode(images).shape == (2, encoder.spec.tokens, encoder.spec.image_dim)
        assert encoder.encode(self.images()[:0]).shape == (0, encoder.spec.tokens, encoder.spec.image_dim)

    def test_images_differ_and_repeat_without_gradients(self, encoder: Any) -> None:
        first, second = encoder.encode(self.images()), encoder.encode(self.images())
        assert torch.equal(first, second)
        assert not torch.equal(first[0], first[1])
        assert not first.requires_grad
        assert first.isfinite().all()

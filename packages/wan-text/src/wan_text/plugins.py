"""The kinds `wan_text_encoders`, `wan_image_encoders` and `wan_prompt_rewriters`: hooks, spec records, lookups. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ._shared.discover import PluginManager as PluginManager
from ._shared.discover import discover as discover
from ._shared.discover import hookimpl as hookimpl
from ._shared.discover import hookspec, resolve
from ._shared.discover import plugin_manager as _plugin_manager
from ._shared.spec import ModelSpec, Spec

if TYPE_CHECKING:
    import pluggy

UMT5_TARGET = "wan_text.encoder:TextEncoder"


@dataclass(frozen=True)
class TextEncoderSpec(ModelSpec):
    """A text encoder.

    embedding_space: tag of the space; equal width is not equal space (`"umt5-xxl"`, `"tiny-2"`)
    embed_dim: width of a context token
    max_tokens: longest context, the end token included
    """

    embedding_space: str
    embed_dim: int
    max_tokens: int

    def load_streamed(self, *, dtype: Any = None, device: Any = None) -> Any:
        """As `load`, with the weights left in their file where the encoder is this package's umT5; any other is loaded."""
        return load_spec(self, dtype=dtype, device=device, stream=self.target == UMT5_TARGET and self.weights is not None)


@dataclass(frozen=True)
class ImageEncoderSpec(ModelSpec):
    """An encoder of reference images.

    image_space: tag of the space; equal width is not equal space (`"clip-vit-h-14"`)
    image_dim: width of an image token
    tokens: tokens an image
    """

    image_space: str
    image_dim: int
    tokens: int


@dataclass(frozen=True)
class PromptRewriterSpec(Spec):
    """A rewriter of prompts; `target` makes one from keyword options and has `rewrite` (`wan_text.rewrite.PromptRewriter`)."""


class Hooks:
    """What a plugin of these kinds implements."""

    @hookspec
    def wan_text_encoders(self) -> Iterable[TextEncoderSpec]:  # type: ignore[empty-body]
        """Text encoders, as specs."""

    @hookspec
    def wan_image_encoders(self) -> Iterable[ImageEncoderSpec]:  # type: ignore[empty-body]
        """Encoders of reference images, as specs."""

    @hookspec
    def wan_prompt_rewriters(self) -> Iterable[PromptRewriterSpec]:  # type: ignore[empty-body]
        """Rewriters of prompts, as specs."""


def plugin_manager() -> PluginManager:
    """A fresh manager with every installed plugin."""
    return _plugin_manager(Hooks)


def find_text_encoder(ref: str, pm: pluggy.PluginManager | None = None) -> TextEncoderSpec:
    """The spec that a path, name, Hub id or import string names; LookupError says what is installed."""
    spec: TextEncoderSpec = resolve("wan_text_encoders", ref, pm or plugin_manager(), install="wan-text")
    return spec


def load_text_encoder(
    ref: str = "wan-text:tiny",
    *,
    dtype: Any = None,
    device: Any = None,
    quantise: str | None = None,
    stream: bool = False,
    pm: pluggy.PluginManager | None = None,
) -> Any:
    """Load a text encoder with its tokenizer by path, name, Hub id or import string, in eval mode.

    quantise: "int8" for products with int8 weights, for encoders whose `from_pretrained` takes it, as `TextEncoder`'s does
    stream: leave the weights of a umT5 encoder in their file, and compute with half a block at a time
    Example: `load_text_encoder("tiny").encode(["a red circle"])` is a list with one tensor `[L, D]`.
    """
    return load_spec(find_text_encoder(ref, pm), dtype=dtype, device=device, quantise=quantise, stream=stream)


def load_spec(spec: TextEncoderSpec, *, dtype: Any = None, device: Any = None, quantise: str | None = None, stream: bool = False) -> Any:
    """What `load_text_encoder` loads for a spec."""
    if not stream and quantise is None:
        return spec.load(dtype=dtype, device=device)
    if spec.target != UMT5_TARGET or spec.weights is None:
        raise ValueError(f"'{spec.name}' is no umT5 encoder of wan-text: it can be neither quantised nor streamed")
    if quantise not in (None, "int8"):
        raise ValueError(f"unknown quantisation '{quantise}', expected int8")
    if stream and quantise:
        raise ValueError(
            "a streamed encoder computes with the weights as the file has them: leave out quantise, or save an int8 file first"
        )
    from .encoder import TextEncoder
    from .streaming import StreamingTextEncoder

    if stream:
        loaded: Any = StreamingTextEncoder.from_pretrained(spec.weights, dtype=dtype, device=device)
    else:
        loaded = TextEncoder.from_pretrained(spec.weights, dtype=dtype, device=device, quantise="int8")
    loaded.name = None if spec.name == spec.weights else spec.name
    return loaded


def find_image_encoder(ref: str, pm: pluggy.PluginManager | None = None) -> ImageEncoderSpec:
    """The spec that a path, name, Hub id or import string names; LookupError says what is installed."""
    spec: ImageEncoderSpec = resolve("wan_image_encoders", ref, pm or plugin_manager(), install="wan-text")
    return spec


def load_image_encoder(ref: str = "clip-vit-h-14", *, dtype: Any = None, device: Any = None, pm: pluggy.PluginManager | None = None) -> Any:
    """Load an encoder of reference images by path, name, Hub id or import string, in eval mode.

    Example: `load_image_encoder("clip-vit-h-14").encode(images)` is `[B, 257, 1280]` for images `[B, 3, H, W]` in [-1, 1].
    """
    return find_image_encoder(ref, pm).load(dtype=dtype, device=device)


def find_prompt_rewriter(ref: str, pm: pluggy.PluginManager | None = None) -> PromptRewriterSpec:
    """The spec that a name or import string names; LookupError says what is installed."""
    spec: PromptRewriterSpec = resolve("wan_prompt_rewriters", ref, pm or plugin_manager(), install="wan-text")
    return spec


def load_prompt_rewriter(ref: str = "template", *, pm: pluggy.PluginManager | None = None, **options: Any) -> Any:
    """Make a rewriter of prompts by name or import string; ValueError where it does not take these options.

    Example: `load_prompt_rewriter("openai", base_url="http://localhost:8000/v1", model="qwen").rewrite(["a cat"])[0].text`
    """
    spec = find_prompt_rewriter(ref, pm)
    try:
        return spec.resolve()(**options)
    except TypeError as error:
        raise ValueError(f"prompt rewriter '{ref}' cannot be made with {', '.join(options) or 'no options'}: {error}") from error

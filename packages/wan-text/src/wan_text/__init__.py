"""The umT5 text encoder of Wan: prompts to context tokens. Importing it imports no torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .config import UMT5Config as UMT5Config
    from .encoder import TextEncoder as TextEncoder
    from .plugins import ImageEncoderSpec as ImageEncoderSpec
    from .plugins import TextEncoderSpec as TextEncoderSpec
    from .plugins import hookimpl as hookimpl
    from .plugins import load_image_encoder as load_image_encoder
    from .plugins import load_prompt_rewriter as load_prompt_rewriter
    from .plugins import load_text_encoder as load_text_encoder
    from .tokenizer import Tokenizer as Tokenizer
    from .umt5 import UMT5Encoder as UMT5Encoder

_EXPORTS = {
    "ImageEncoderSpec": "wan_text.plugins",
    "TextEncoderSpec": "wan_text.plugins",
    "hookimpl": "wan_text.plugins",
    "load_image_encoder": "wan_text.plugins",
    "load_prompt_rewriter": "wan_text.plugins",
    "load_text_encoder": "wan_text.plugins",
    "UMT5Encoder": "wan_text.umt5",
    "UMT5Config": "wan_text.config",
    "TextEncoder": "wan_text.encoder",
    "Tokenizer": "wan_text.tokenizer",
}
__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

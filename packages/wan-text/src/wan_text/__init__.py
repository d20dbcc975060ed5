"""The umT5 text encoder of Wan: prompts to context tokens. Importing it imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._shared.exports import exported

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
    "ImageEncoderSpec": "plugins",
    "TextEncoderSpec": "plugins",
    "hookimpl": "plugins",
    "load_image_encoder": "plugins",
    "load_prompt_rewriter": "plugins",
    "load_text_encoder": "plugins",
    "UMT5Encoder": "umt5",
    "UMT5Config": "config",
    "TextEncoder": "encoder",
    "Tokenizer": "tokenizer",
}
__all__ = list(_EXPORTS)
__getattr__, __dir__ = exported(__name__, _EXPORTS, "__version__")

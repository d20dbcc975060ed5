"""The text encoders of this package."""

from __future__ import annotations

from functools import partial

from .plugins import TextEncoderSpec, hookimpl

_Spec = partial(TextEncoderSpec, target="wan_text.encoder:TextEncoder", format="wan-text/1", describe="wan_text.checkpoint:describe")


@hookimpl
def wan_text_encoders() -> list[TextEncoderSpec]:
    return [
        _Spec(
            name="umt5-xxl",
            embedding_space="umt5-xxl",
            embed_dim=4096,
            max_tokens=512,
            weights="hub:Wan-AI/Wan2.1-T2V-1.3B",
            summary="the encoder of every Wan model, 5.7 B parameters",
        ),
        _Spec(
            name="tiny",
            embedding_space="tiny-1",
            embed_dim=96,
            max_tokens=32,
            weights="pkg:wan_text/weights/tiny",
            summary="built in, knows the words of the moving-shapes captions only",
        ),
    ]

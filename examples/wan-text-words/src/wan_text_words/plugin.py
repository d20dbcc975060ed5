"""What this distribution offers. Imports no torch: the class is named, and imported only when it is used."""

from __future__ import annotations

from wan_text.plugins import TextEncoderSpec, hookimpl

SPEC = TextEncoderSpec(
    "words",
    "wan_text_words.encoder:Words",
    embedding_space="words-1",
    embed_dim=64,
    max_tokens=32,
    summary="a fixed random vector for each word; nothing is learnt",
)


@hookimpl
def wan_text_encoders() -> list[TextEncoderSpec]:
    return [SPEC]

"""The encoders and rewriters of this package."""

from __future__ import annotations

from functools import partial

from .plugins import ImageEncoderSpec, PromptRewriterSpec, TextEncoderSpec, hookimpl

_Spec = partial(
    TextEncoderSpec,
    target="wan_text.encoder:TextEncoder",
    format="wan-text/1",
    describe="wan_text.checkpoint:describe",
    footprint="wan_text.footprint:encoding_text",
)


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
            embedding_space="tiny-2",
            embed_dim=96,
            max_tokens=32,
            weights="pkg:wan_text/weights/tiny",
            summary="built in, knows the words of the moving-shapes captions only",
        ),
    ]


@hookimpl
def wan_image_encoders() -> list[ImageEncoderSpec]:
    return [
        ImageEncoderSpec(
            name="clip-vit-h-14",
            target="wan_text.clip_vision:CLIPVision",
            format="wan-text-image/1",
            describe="wan_text.clip_checkpoint:describe",
            footprint="wan_text.footprint:encoding_image",
            image_space="clip-vit-h-14",
            image_dim=1280,
            tokens=257,
            weights="hub:Wan-AI/Wan2.1-I2V-14B-480P",
            summary="the vision tower of Wan2.1 I2V, FLF2V and Animate, 0.6 B parameters",
        ),
    ]


@hookimpl
def wan_prompt_rewriters() -> list[PromptRewriterSpec]:
    return [
        PromptRewriterSpec("template", "wan_text.rewrite:TemplateRewriter", summary="puts prompts into a template"),
        PromptRewriterSpec("openai", "wan_text.rewrite:ChatRewriter", summary="asks a language model behind an OpenAI-compatible endpoint"),
    ]

"""The backbones, schedulers and models of this package."""

from __future__ import annotations

from functools import partial

from .plugins import BackboneSpec, SchedulerSpec, VideoModelSpec, hookimpl

_Backbone = partial(BackboneSpec, target="wan_dit.model:WanDiT", format="wan-dit/1", describe="wan_dit.checkpoint:describe")
_Wan21 = partial(
    _Backbone, latent_space="wan2.1", latent_channels=16, stride=(4, 8, 8), embedding_space="umt5-xxl", text_dim=4096, text_len=512
)

# what the captions of the built-in model's training data are made of (the data set `shapes` of wan-train)
TINY_WORDS = {
    "colours": ("red", "yellow", "green", "blue", "purple", "orange"),
    "shapes": ("circle", "square", "triangle", "star"),
    "motions": ("left", "right", "up", "down", "still", "upward", "downward"),
    "backgrounds": ("black", "white"),
    "others": (
        *("a", "an", "the", "that", "in", "on", "to", "with", "against", "background", "is"),
        *("goes", "moves", "moving", "standing", "stands", "staying", "stays"),
    ),
}


@hookimpl
def wan_backbones() -> list[BackboneSpec]:
    return [
        _Wan21(name="wan2.1-t2v-1.3b", weights="hub:Wan-AI/Wan2.1-T2V-1.3B", summary="Wan2.1 text to video, 1.4 B parameters"),
        _Wan21(name="wan2.1-t2v-14b", weights="hub:Wan-AI/Wan2.1-T2V-14B", summary="Wan2.1 text to video, 14.3 B parameters"),
        _Backbone(
            name="tiny",
            latent_space="tiny-1",
            latent_channels=16,
            stride=(4, 8, 8),
            embedding_space="tiny-1",
            text_dim=96,
            text_len=32,
            weights="pkg:wan_dit/weights/tiny",
            summary="built in, draws moving shapes only",
        ),
    ]


@hookimpl
def wan_schedulers() -> list[SchedulerSpec]:
    return [
        SchedulerSpec("unipc", "wan_dit.schedulers.unipc:UniPC", summary="multistep, order 2: the official default"),
        SchedulerSpec("euler", "wan_dit.schedulers.euler:Euler", summary="first order, float timesteps"),
    ]


@hookimpl
def wan_models() -> list[VideoModelSpec]:
    # parts are named with their distribution, so that these models stay whole whatever else offers a `tiny` or a `unipc`
    return [
        VideoModelSpec(
            "tiny",
            backbone="wan-dit:tiny",
            vae="wan-vae:tiny",
            text_encoder="wan-text:tiny",
            scheduler="wan-dit:unipc",
            steps=15,
            shift=2.0,
            guidance=2.0,
            size=(64, 64),
            frames=17,
            fps=8,
            summary="built in: six colours, four shapes, five motions",
            extra={"words": TINY_WORDS},
        ),
        VideoModelSpec(
            "wan2.1-t2v-1.3b",
            backbone="wan-dit:wan2.1-t2v-1.3b",
            vae="wan-vae:wan2.1",
            text_encoder="wan-text:umt5-xxl",
            scheduler="wan-dit:unipc",
            shift=8.0,
            guidance=6.0,
            summary="text to video at 480p",
        ),
        VideoModelSpec(
            "wan2.1-t2v-14b",
            backbone="wan-dit:wan2.1-t2v-14b",
            vae="wan-vae:wan2.1",
            text_encoder="wan-text:umt5-xxl",
            scheduler="wan-dit:unipc",
            size=(1280, 720),
            summary="text to video at 480p and 720p",
        ),
    ]

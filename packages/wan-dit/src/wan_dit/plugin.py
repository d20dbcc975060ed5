"""The parts and models of this package."""

from __future__ import annotations

from functools import partial

from .plugins import AttentionSpec, BackboneSpec, CacheSpec, SchedulerSpec, VideoModelSpec, hookimpl

_Backbone = partial(BackboneSpec, target="wan_dit.model:WanDiT", format="wan-dit/1", describe="wan_dit.checkpoint:describe")
_Wan21 = partial(
    _Backbone,
    latent_space="wan2.1",
    latent_channels=16,
    stride=(4, 8, 8),
    embedding_space="umt5-xxl",
    text_dim=4096,
    text_len=512,
    in_channels=16,
)
_WithImages = partial(_Wan21, in_channels=36, image_dim=1280)

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


_HUB = "hub:Wan-AI"
_T2V_A14B, _I2V_A14B = f"{_HUB}/Wan2.2-T2V-A14B", f"{_HUB}/Wan2.2-I2V-A14B"
_BACKBONES = (
    _Wan21("wan2.1-t2v-1.3b", parameters=1_418_996_800, weights=f"{_HUB}/Wan2.1-T2V-1.3B", summary="text to video"),
    _Wan21("wan2.1-t2v-14b", parameters=14_288_491_584, weights=f"{_HUB}/Wan2.1-T2V-14B", summary="text to video"),
    _WithImages("wan2.1-i2v-14b-480p", parameters=16_394_878_784, weights=f"{_HUB}/Wan2.1-I2V-14B-480P", summary="image to video"),
    _WithImages("wan2.1-i2v-14b-720p", parameters=16_394_878_784, weights=f"{_HUB}/Wan2.1-I2V-14B-720P", summary="image to video"),
    _WithImages(
        "wan2.1-flf2v-14b",
        parameters=16_395_536_704,
        weights=f"{_HUB}/Wan2.1-FLF2V-14B-720P",
        image_tokens=514,
        summary="first and last frame",
    ),
    _Wan21("wan2.1-vace-1.3b", parameters=2_153_972_032, weights=f"{_HUB}/Wan2.1-VACE-1.3B", vace=True, summary="VACE"),
    _Wan21("wan2.1-vace-14b", parameters=17_337_592_896, weights=f"{_HUB}/Wan2.1-VACE-14B", vace=True, summary="VACE"),
    _Wan21(
        "wan2.2-t2v-a14b-high",
        parameters=14_288_491_584,
        weights=f"{_T2V_A14B}/high_noise_model",
        summary="text to video, expert of high noise",
    ),
    _Wan21(
        "wan2.2-t2v-a14b-low",
        parameters=14_288_491_584,
        weights=f"{_T2V_A14B}/low_noise_model",
        summary="text to video, expert of low noise",
    ),
    _Wan21(
        "wan2.2-i2v-a14b-high",
        parameters=14_288_901_184,
        weights=f"{_I2V_A14B}/high_noise_model",
        in_channels=36,
        summary="image to video, expert of high noise",
    ),
    _Wan21(
        "wan2.2-i2v-a14b-low",
        parameters=14_288_901_184,
        weights=f"{_I2V_A14B}/low_noise_model",
        in_channels=36,
        summary="image to video, expert of low noise",
    ),
    _Backbone(
        "wan2.2-ti2v-5b",
        parameters=4_999_787_712,
        latent_space="wan2.2",
        latent_channels=48,
        stride=(4, 16, 16),
        embedding_space="umt5-xxl",
        text_dim=4096,
        text_len=512,
        in_channels=48,
        weights=f"{_HUB}/Wan2.2-TI2V-5B",
        summary="text, or a first frame, to video",
    ),
    _Backbone(
        "tiny",
        parameters=1_564_352,
        latent_space="tiny-2",
        latent_channels=16,
        stride=(4, 8, 8),
        embedding_space="tiny-2",
        text_dim=96,
        text_len=32,
        in_channels=16,
        weights="pkg:wan_dit/weights/tiny",
        summary="built in, draws moving shapes only",
    ),
)


@hookimpl
def wan_backbones() -> list[BackboneSpec]:
    return list(_BACKBONES)


@hookimpl
def wan_schedulers() -> list[SchedulerSpec]:
    own = "wan_dit.schedulers"
    return [
        SchedulerSpec("unipc", f"{own}.unipc:UniPC", summary="multistep, order 2: the official default"),
        SchedulerSpec("dpm++", f"{own}.dpm:DPMpp", summary="DPM-Solver++ 2M, multistep, order 2: the other official one"),
        SchedulerSpec("euler", f"{own}.euler:Euler", summary="first order, float timesteps"),
        SchedulerSpec("heun", f"{own}.heun:Heun", summary="order 2, 2 * steps - 1 evaluations"),
        SchedulerSpec("lcm", f"{own}.lcm:LCM", summary="fresh noise at every step, for consistency and DMD models"),
        SchedulerSpec("lightx2v-4step", f"{own}.step_list:lightx2v_4step", summary="LightX2V's distilled models, shift 5"),
        SchedulerSpec("self-forcing-4step", f"{own}.step_list:self_forcing_4step", summary="Self-Forcing 1.3B, shift 5, fresh noise"),
        SchedulerSpec("self-forcing-8step", f"{own}.step_list:self_forcing_8step", summary="Self-Forcing A14B, shift 12, fresh noise"),
        SchedulerSpec("fastwan-3step", f"{own}.step_list:fastwan_3step", summary="FastWan, fresh noise"),
        SchedulerSpec("rcm-4step", f"{own}.trigflow:TrigFlow", summary="rCM and TurboDiffusion, 1 to 4 steps, fresh noise"),
        SchedulerSpec("rcm-i2v-4step", f"{own}.trigflow:rcm_i2v_4step", summary="the same, image to video"),
    ]


@hookimpl
def wan_attentions() -> list[AttentionSpec]:
    own = "wan_dit.attentions"
    return [
        AttentionSpec("sdpa", "wan_dit.attention:sdpa", summary="the kernel that torch chooses: the default"),
        AttentionSpec("sdpa-math", f"{own}:sdpa_math", summary="torch, matrix products: slow, on every device"),
        AttentionSpec("sdpa-flash", f"{own}:sdpa_flash", summary="torch, flash attention"),
        AttentionSpec("sdpa-efficient", f"{own}:sdpa_efficient", summary="torch, memory-efficient attention, GPU"),
        AttentionSpec("sdpa-cudnn", f"{own}:sdpa_cudnn", summary="torch, cuDNN, GPU"),
        AttentionSpec("flash", f"{own}:flash", package="flash-attn", summary="FlashAttention 3 or 2, GPU in half precision"),
        AttentionSpec(
            "sage", f"{own}:sage", package="sageattention", tolerance=0.1, summary="SageAttention, 8 bits, GPU in half precision"
        ),
    ]


@hookimpl
def wan_caches() -> list[CacheSpec]:
    own = "wan_dit.caching"
    return [
        CacheSpec("teacache", f"{own}.teacache:TeaCache", summary="no trunk while the time embedding changes little"),
        CacheSpec("magcache", f"{own}.magcache:MagCache", summary="no trunk while its magnitude, measured beforehand, changes little"),
        CacheSpec("easycache", f"{own}.easycache:EasyCache", summary="no forward while the velocity should change little"),
        CacheSpec("first-block", f"{own}.firstblock:FirstBlockCache", summary="only the first block while its output changes little"),
        CacheSpec("attention", f"{own}.attention_cache:AttentionCache", summary="self-attention every few evaluations"),
        CacheSpec("cfg-gate", f"{own}.cfg_gate:CfgGate", summary="no negative prompt late in a run; goes with another: NAME+cfg-gate"),
    ]


# The official `sample_neg_prompt`, which the models' defaults were chosen with; the tasks put words in front of it.
NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，"
    "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
NEGATIVE_I2V = f"镜头晃动，{NEGATIVE}"
NEGATIVE_FLF2V = f"镜头切换，{NEGATIVE_I2V}"

_Model = partial(
    VideoModelSpec, text_encoder="wan-text:umt5-xxl", scheduler="wan-dit:unipc", vae="wan-vae:wan2.1", negative_prompt=NEGATIVE
)
_I2V = partial(_Model, image_encoder="wan-text:clip-vit-h-14", negative_prompt=NEGATIVE_I2V, task="i2v", steps=40)
_HD = (1280, 720)
# parts are named with their distribution, so that these models stay whole whatever else offers a `tiny` or a `unipc`
_OWN = "wan-dit:wan2"
_MODELS = (
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
    # shift and guidance of the 1.3 B model are those that its README recommends, not the official defaults of 5 and 5
    _Model("wan2.1-t2v-1.3b", f"{_OWN}.1-t2v-1.3b", shift=8.0, guidance=6.0, summary="text to video at 480p"),
    _Model("wan2.1-t2v-14b", f"{_OWN}.1-t2v-14b", size=_HD, summary="text to video at 480p and 720p"),
    _Model("wan2.1-t2i-14b", f"{_OWN}.1-t2v-14b", size=(1024, 1024), frames=1, task="t2i", summary="text to image"),
    _I2V("wan2.1-i2v-14b-480p", f"{_OWN}.1-i2v-14b-480p", shift=3.0, summary="image to video at 480p"),
    _I2V("wan2.1-i2v-14b-720p", f"{_OWN}.1-i2v-14b-720p", size=_HD, summary="image to video at 720p"),
    _I2V(
        "wan2.1-flf2v-14b",
        f"{_OWN}.1-flf2v-14b",
        shift=16.0,
        steps=50,
        size=_HD,
        task="flf2v",
        negative_prompt=NEGATIVE_FLF2V,
        summary="first and last frame to video",
    ),
    _Model("wan2.1-vace-1.3b", f"{_OWN}.1-vace-1.3b", shift=16.0, task="vace", summary="creation and editing at 480p"),
    _Model("wan2.1-vace-14b", f"{_OWN}.1-vace-14b", shift=16.0, size=_HD, task="vace", summary="creation and editing at 480p and 720p"),
    _Model(
        "wan2.2-t2v-a14b",
        f"{_OWN}.2-t2v-a14b-high",
        low_noise_backbone=f"{_OWN}.2-t2v-a14b-low",
        boundary=0.875,
        steps=40,
        shift=12.0,
        guidance=(3.0, 4.0),
        size=_HD,
        summary="text to video, two experts",
    ),
    _Model(
        "wan2.2-i2v-a14b",
        f"{_OWN}.2-i2v-a14b-high",
        low_noise_backbone=f"{_OWN}.2-i2v-a14b-low",
        boundary=0.9,
        steps=40,
        guidance=(3.5, 3.5),
        size=_HD,
        task="i2v",
        summary="image to video, two experts",
    ),
    _Model(
        "wan2.2-ti2v-5b",
        f"{_OWN}.2-ti2v-5b",
        vae="wan-vae:wan2.2",
        size=(1280, 704),
        frames=121,
        fps=24,
        task="ti2v",
        summary="text, or a first frame, to video at 720p",
    ),
)


@hookimpl
def wan_models() -> list[VideoModelSpec]:
    return list(_MODELS)

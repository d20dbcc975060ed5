"""Whole pipelines against diffusers: the same small random models, prompts, pictures and noise, to final latents."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
)
from PIL import Image
from torch import Tensor, nn
from wan_dit.model import WanDiT
from wan_dit.pipeline import Pipeline
from wan_dit.plugins import VideoModelSpec, plugin_manager
from wan_dit.tasks import ImageToVideo, Vace

POSITIVE, NEGATIVE = "positive", "negative"
STEPS, SHIFT, FRAMES, SIZE = 4, 5.0, 9, (48, 32)
TEXT = {POSITIVE: torch.randn(7, 8, generator=torch.Generator().manual_seed(1)), NEGATIVE: torch.zeros(3, 8) + 0.5}
SMALL = {"num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 40, "freq_dim": 16, "text_dim": 8, "num_layers": 2}
VAE_21 = {"base_dim": 4, "z_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
VAE_22 = {
    "base_dim": 4, "decoder_base_dim": 4, "z_dim": 48, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1, "is_residual": True,
    "patch_size": 2, "in_channels": 12, "out_channels": 12, "scale_factor_spatial": 16,
    "latents_mean": [0.1] * 48, "latents_std": [1.5] * 48,
}  # fmt: skip


class OfficialGrid(UniPCMultistepScheduler):
    """diffusers' solver on the sigmas of the official code, which it does not choose by itself."""

    def set_timesteps(self, num_inference_steps: int, device: Any = None, **_: Any) -> None:
        super().set_timesteps(num_inference_steps, device, sigmas=np.linspace(0.9990000128746033, 0, num_inference_steps + 1)[:-1])


def scheduler() -> OfficialGrid:
    return OfficialGrid(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT)


def drawn(module: nn.Module, seed: int) -> Any:
    """No tensor of it zero or one, so that no branch is unseen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            scale = 0.4 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return module.eval()


class Known:
    """Encoders of text and of images with fixed results."""

    def __init__(self, images: Tensor | None = None) -> None:
        self.images = images
        self.spec = SimpleNamespace(name="known", embedding_space="t", embed_dim=8, max_tokens=512, image_dim=20)

    def encode(self, given: list[Any]) -> Any:
        return [TEXT[prompt] for prompt in given] if isinstance(given[0], str) else self.images


class Models:
    """The same random models for diffusers and for us; ours are read from the folders that diffusers writes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0

    def transformer(self, kind: Any = WanTransformer3DModel, **config: Any) -> tuple[Any, WanDiT]:
        self.count += 1
        theirs = drawn(kind(**{**SMALL, **config}), self.count)
        theirs.save_pretrained(self.folder / f"transformer{self.count}")
        ours = WanDiT.from_pretrained(self.folder / f"transformer{self.count}")
        ours.config = ours.config.model_copy(update={"latent_space": "v", "embedding_space": "t"})
        return theirs, ours

    def vae(self, config: dict[str, Any]) -> tuple[Any, Any]:
        from wan_vae import load_vae

        theirs = drawn(AutoencoderKLWan(**config), 99)
        theirs.save_pretrained(self.folder / "vae")
        ours = load_vae(str(self.folder / "vae"))
        ours.config = ours.config.model_copy(update={"latent_space": "v"})
        return theirs, ours


@pytest.fixture
def models(tmp_path: Path) -> Models:
    return Models(tmp_path)


def ours(
    parts: dict[str, Any], task: Any, guidance: Any = 3.0, boundary: float = 0.0, kind: str = "t2v", size: tuple[int, int] = SIZE
) -> tuple[Tensor, Tensor]:
    """First noise and final latents of our pipeline."""
    low = "x" if "low_noise_backbone" in parts else None
    own = VideoModelSpec(
        "m", "b", "v", "t", steps=STEPS, shift=SHIFT, guidance=guidance, size=size, frames=FRAMES,
        negative_prompt=NEGATIVE, task=kind, low_noise_backbone=low, boundary=boundary,
    )  # fmt: skip
    pipe = Pipeline(own, **parts, text_encoder=parts.get("text_encoder") or Known(), scheduler="wan-dit:unipc", pm=plugin_manager())
    noise: list[Tensor] = []
    draw = torch.randn

    def remember(*shape: Any, **options: Any) -> Tensor:
        noise.append(draw(*shape, **options))
        return noise[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn", remember)
        steps = [event.state for event in pipe.stream(POSITIVE, task=task, seed=3, size=size) if hasattr(event, "state")]
    return noise[0], steps[-1].latents


def given(noise: Tensor, guidance: float = 3.0, size: tuple[int, int] = SIZE) -> dict[str, Any]:
    rows = {name: F.pad(tokens, (0, 0, 0, 512 - len(tokens)))[None] for name, tokens in TEXT.items()}
    return {
        "prompt_embeds": rows[POSITIVE], "negative_prompt_embeds": rows[NEGATIVE], "latents": noise.clone(), "guidance_scale": guidance,
        "num_inference_steps": STEPS, "num_frames": FRAMES, "width": size[0], "height": size[1], "output_type": "latent",
    }  # fmt: skip


def off(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def picture(seed: int, size: tuple[int, int] = SIZE) -> Image.Image:
    """Of the very size of the video, where nobody has to resize."""
    small = np.random.default_rng(seed).integers(0, 255, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


@torch.no_grad()
def test_text_to_video(models: Models) -> None:
    (theirs, own), (vae, our_vae) = models.transformer(), models.vae(VAE_21)
    noise, latents = ours({"backbone": own, "vae": our_vae}, None)
    pipe = WanPipeline(tokenizer=None, text_encoder=None, vae=vae, scheduler=scheduler(), transformer=theirs)
    assert off(latents, pipe(**given(noise)).frames) <= 1e-4


@torch.no_grad()
def test_two_experts(models: Models) -> None:
    (high, our_high), (low, our_low), (vae, our_vae) = models.transformer(), models.transformer(), models.vae(VAE_21)
    parts = {"backbone": our_high, "low_noise_backbone": our_low, "vae": our_vae}
    noise, latents = ours(parts, None, guidance=(2.0, 4.0), boundary=0.875)
    pipe = WanPipeline(
        tokenizer=None, text_encoder=None, vae=vae, scheduler=scheduler(), transformer=high, transformer_2=low, boundary_ratio=0.875
    )
    assert off(latents, pipe(**given(noise, 4.0), guidance_scale_2=2.0).frames) <= 1e-4
    assert off(latents, pipe(**given(noise, 2.0), guidance_scale_2=4.0).frames) > 1e-3, "the pair is (low, high)"


@pytest.mark.parametrize("last", [False, True], ids=["i2v", "flf2v"])
@torch.no_grad()
def test_image_to_video_with_image_tokens(models: Models, last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    positions = 514 if last else None
    config = {"in_channels": 36, "out_channels": 16, "image_dim": 20, "added_kv_proj_dim": 32, "pos_embed_seq_len": positions}
    (theirs, own), (vae, our_vae) = models.transformer(**config), models.vae(VAE_21)
    tokens = torch.randn(2 if last else 1, 257, 20, generator=torch.Generator().manual_seed(5))
    images = [picture(1), picture(2)][: 2 if last else 1]
    noise, latents = ours({"backbone": own, "vae": our_vae, "image_encoder": Known(tokens)}, ImageToVideo(*images), kind="i2v")
    pipe = WanImageToVideoPipeline(tokenizer=None, text_encoder=None, vae=vae, scheduler=scheduler(), transformer=theirs)
    monkeypatch.setattr(pipe, "encode_image", lambda *_: tokens)
    expected = pipe(image=images[0], last_image=images[1] if last else None, **given(noise)).frames
    assert off(latents, expected) <= 1e-4


@torch.no_grad()
def test_image_to_video_of_two_experts(models: Models) -> None:
    config = {"in_channels": 36, "out_channels": 16}
    (high, our_high), (low, our_low), (vae, our_vae) = models.transformer(**config), models.transformer(**config), models.vae(VAE_21)
    parts = {"backbone": our_high, "low_noise_backbone": our_low, "vae": our_vae}
    noise, latents = ours(parts, ImageToVideo(picture(1)), guidance=(3.5, 2.5), boundary=0.9, kind="i2v")
    pipe = WanImageToVideoPipeline(
        tokenizer=None, text_encoder=None, vae=vae, scheduler=scheduler(), transformer=high, transformer_2=low, boundary_ratio=0.9
    )
    assert off(latents, pipe(image=picture(1), **given(noise, 2.5), guidance_scale_2=3.5).frames) <= 1e-4


@torch.no_grad()
def test_a_first_frame_whose_time_is_zero(models: Models) -> None:
    size = (96, 64)
    (theirs, own), (vae, our_vae) = models.transformer(in_channels=48, out_channels=48), models.vae(VAE_22)
    noise, latents = ours({"backbone": own, "vae": our_vae}, ImageToVideo(picture(1, size)), kind="ti2v", size=size)
    pipe = WanImageToVideoPipeline(
        tokenizer=None, text_encoder=None, vae=vae, scheduler=scheduler(), transformer=theirs, expand_timesteps=True
    )
    assert off(latents, pipe(image=picture(1, size), **given(noise, size=size)).frames) <= 1e-4


@pytest.mark.parametrize("references", [0, 2])
@torch.no_grad()
def test_vace(models: Models, references: int) -> None:
    config = {"vace_layers": [0, 1], "vace_in_channels": 96}
    (theirs, own), (vae, our_vae) = models.transformer(WanVACETransformer3DModel, **config), models.vae(VAE_21)
    frames = [picture(10 + i) for i in range(FRAMES)]
    masks = [Image.fromarray((np.arange(32)[:, None] + np.arange(48) > 30 + i).astype(np.uint8) * 255) for i in range(FRAMES)]
    pictures = tuple(picture(30 + i) for i in range(references))
    video = torch.stack([torch.from_numpy(np.array(frame)).permute(2, 0, 1) for frame in frames], dim=1).float() / 127.5 - 1
    mask = torch.stack([torch.from_numpy(np.array(each))[None] for each in masks], dim=1).float() / 255
    noise, latents = ours({"backbone": own, "vae": our_vae}, Vace(video, mask, pictures, scale=0.7), kind="vace")
    pipe = WanVACEPipeline(tokenizer=None, text_encoder=None, vae=vae, scheduler=scheduler(), transformer=theirs)
    turned = list(pictures[::-1]) or None  # diffusers puts each reference in front of those before, the official code in order
    expected = pipe(video=frames, mask=masks, reference_images=turned, conditioning_scale=0.7, **given(noise)).frames
    assert noise.shape[2] == 3 + references
    assert off(latents, expected) <= 1e-4

"""DC-AE, the image autoencoders of deep compression (mit-han-lab/efficientvit; Sana's are of the kind), as codecs of films.

Every frame is a picture of its own, 32, 64 or 128 times smaller in height and width as a latent. There is no posterior: an
encoder gives the latents themselves. Own names are the official ones.
Shapes: B batch, C channels, T frames, H height, W width, N = B * T.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from einops import rearrange
from torch import Tensor, nn

from .._shared.weights import Pretrained, State, locate, read_config, rename
from ..plugins import VAESpec
from ..shapes import check_latents, check_video
from .dcae_config import PRESETS, DCAEConfig, validated
from .dcae_diffusers import DIFFUSERS_CLASS, diffusers_config, from_diffusers, from_tensors, to_tensors
from .dcae_infer import infer_config, is_diffusers
from .dcae_layers import Decoder, Encoder


class DCAE(Pretrained):
    """An autoencoder of pictures: the interface of a video VAE whose frames do not know of each other.

    Video is `[B, 3, T, H, W]` in [-1, 1] with H, W multiples of stride[1]; latents are
    `[B, z_dim, T, H / stride[1], W / stride[2]]`, the encoder's output times `config.scaling_factor`. It encodes no log-variance.
    `encode`, `decode` and the streams run without gradients, a chunk of frames at a time; `moments` and `reconstruct` are
    differentiable and take all frames at once.

    Example: `vae = load_vae("dc-ae-f32c32-in-1.0"); latents = vae.encode(pictures)` with pictures `[B, 3, 1, H, W]`
    """

    format = "wan-dcae/1"
    hub_files = ("config.json", "model_index.json", "vae/*", "model.safetensors", "diffusion_pytorch_model*")

    def __init__(self, config: DCAEConfig = PRESETS["dc-ae-f32c32-in-1.0"]) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Video to normalised latents, a frame at a time. ValueError where H or W does not divide."""
        check_video(video, self.config.stride)
        return torch.cat(list(self.encode_stream(video.split(1, dim=2))), dim=2)

    @torch.no_grad()
    def decode(self, latents: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Normalised latents to video, clamped to [-1, 1]. The decoder draws no noise: `generator` is not used."""
        check_latents(latents, self.config.z_dim)
        return torch.cat(list(self.decode_stream(latents.split(1, dim=2))), dim=2)

    @torch.no_grad()
    def encode_stream(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Chunks of frames to chunks of as many latents; nothing is carried from one to the next."""
        for chunk in chunks:
            check_video(chunk, self.config.stride)
            yield self._encode(chunk) * self.config.scaling_factor

    @torch.no_grad()
    def decode_stream(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Chunks of latents to chunks of as many frames."""
        for chunk in chunks:
            check_latents(chunk, self.config.z_dim)
            yield self._decode(chunk / self.config.scaling_factor).clamp(-1, 1)

    def moments(self, video: Tensor) -> tuple[Tensor, None]:
        """The latents before normalisation, and None for the log-variance that there is not; differentiable."""
        check_video(video, self.config.stride)
        return self._encode(video), None

    def reconstruct(
        self, video: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None = None
    ) -> tuple[Tensor, Tensor, None]:
        """`(video, mean, None)`: the reconstruction, unclamped, and the latents; differentiable. Nothing is drawn.

        In training mode the batch norms of a decoder take the statistics of the batch, and learn the running ones, unless frozen.
        """
        mean, _ = self.moments(video)
        return self._decode(mean), mean, None

    @torch.no_grad()
    def fit_normaliser(self, batches: Iterable[Tensor]) -> None:
        """Measure the root mean square of the latents over batches of video, and set its inverse, the scaling factor, in `config`."""
        count, square = 0, torch.zeros((), dtype=torch.float64)
        for video in batches:
            mean = self.moments(video)[0].to("cpu", torch.float64)
            count, square = count + mean.numel(), square + mean.square().sum()
        if count == 0:
            raise ValueError("fit_normaliser needs at least one batch of video, got none")
        factor = float((square / count).clamp_min(1e-12).rsqrt())
        self.config = self.config.model_copy(update={"scaling_factor": factor})

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """All parameters by the parts that staged training freezes and trains."""
        parts: dict[str, list[nn.Module]] = {
            "encoder": [self.encoder.project_in, self.encoder.stages],
            "encoder_head": [self.encoder.project_out],
            "decoder_input": [self.decoder.project_in],
            "decoder": [self.decoder.stages],
            "decoder_head": [self.decoder.project_out],
        }
        return {name: [parameter for module in modules for parameter in module.parameters()] for name, modules in parts.items()}

    @property
    def last_layer(self) -> Tensor:
        """The weight of the last convolution, where losses are balanced by their gradients."""
        last = [module for module in self.decoder.project_out.modules() if isinstance(module, nn.Conv2d)][-1]
        return last.weight

    @property
    def spec(self) -> VAESpec:
        """What this instance is, as the record that plugins list."""
        return _spec_of(self.config, self.name)

    def fingerprint(self) -> str:
        """sha256 of all that decides what a video becomes: weights and scaling factor."""
        return hashlib.sha256(f"{super().fingerprint()} {self.config.scaling_factor}".encode()).hexdigest()

    def reinitialised(self, **architecture: Any) -> Self:
        """A new DC-AE with fresh weights and this one's config, with the fields in `architecture` changed and no scaling factor yet."""
        return super().reinitialised(**{"scaling_factor": 1.0, **architecture})

    @classmethod
    def read_checkpoint(cls, path: Path) -> tuple[DCAEConfig, State]:
        """Configuration and tensors of a file or folder of ours, of an official release or of diffusers.

        ValueError says what else it is, or what is wrong.
        """
        from ..checkpoint import inside
        from ..contents import check_one_dtype, read_tensors, shapes_of

        path = inside(path)
        config, state = _configured(path), read_tensors(path)
        check_one_dtype(state, path)
        config = config or infer_config(shapes_of(state), path)
        with torch.device("meta"):
            own = {name: value.shape for name, value in cls(config).state_dict().items()}
        if is_diffusers(shapes_of(state)):
            return config, from_tensors(state, config, own, path)
        return config, rename(state, {name: name for name in own}, path)

    def to_diffusers(self) -> tuple[dict[str, Any], State]:
        """The fields of config.json and the tensors of diffusers' AutoencoderDC."""
        state = {name: value.detach().cpu() for name, value in self.state_dict().items()}
        return diffusers_config(self.config), to_tensors(state, self.config)

    from_diffusers = staticmethod(from_diffusers)

    @classmethod
    def official_names(cls, config: DCAEConfig) -> dict[str, str]:
        """Own names are the official ones."""
        with torch.device("meta"):
            return {key: key for key in cls(config).state_dict()}

    def _encode(self, video: Tensor) -> Tensor:
        frames = rearrange(video.to(self._dtype), "b c t h w -> (b t) c h w")
        return rearrange(self.encoder(frames), "(b t) c h w -> b c t h w", b=video.shape[0])

    def _decode(self, latents: Tensor) -> Tensor:
        places = rearrange(latents.to(self._dtype), "b c t h w -> (b t) c h w")
        return rearrange(self.decoder(places), "(b t) c h w -> b c t h w", b=latents.shape[0])

    @property
    def _dtype(self) -> torch.dtype:
        return self.last_layer.dtype


def describe(path: str | os.PathLike[str]) -> VAESpec:
    """The facts of a checkpoint, from its config.json or the names and shapes in its header; reads no weights."""
    from ..checkpoint import CONFIG_FILES, inside
    from ..contents import read_header, shapes_of

    file = inside(locate(path, CONFIG_FILES))
    if (config := _configured(file)) is None:
        file = inside(locate(path, DCAE.hub_files))
        config = infer_config(shapes_of(read_header(file)), file)
    with torch.device("meta"):
        return replace(_spec_of(config), parameters=sum(parameter.numel() for parameter in DCAE(config).parameters()))


def is_described(fields: dict[str, Any]) -> bool:
    """Whether these fields of a config.json are of a DC-AE: ours, diffusers', or those of an official release."""
    return fields.get("format") == DCAE.format or fields.get("_class_name") == DIFFUSERS_CLASS or _release(fields) != ""


def _release(fields: dict[str, Any]) -> str:
    """The name of a release in the config.json of its folder, which holds nothing else."""
    name = str(fields.get("model_name", ""))
    return name if name.startswith("dc-ae") else ""


def _configured(path: Path) -> DCAEConfig | None:
    """The configuration that the config.json in a folder or beside a file gives; None where there is none of a DC-AE."""
    fields = read_config(path) or {}
    if fields.get("format") == DCAE.format:
        return validated({name: value for name, value in fields.items() if name != "format"}, path)
    if fields.get("_class_name") == DIFFUSERS_CLASS:
        return from_diffusers(fields, path)
    return PRESETS.get(_release(fields))  # of others the shapes tell


def _spec_of(config: DCAEConfig, name: str | None = None) -> VAESpec:
    return VAESpec(
        name=name or config.latent_space,
        target="wan_vae.codecs.dcae:DCAE",
        latent_space=config.latent_space,
        latent_channels=config.z_dim,
        stride=config.stride,
        format=DCAE.format,
        describe="wan_vae.codecs.dcae:describe",
    )

"""Parity with diffusers' AutoencoderKLWan on random small configurations of both styles."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from wan_vae.checkpoint import diffusers_config, save_diffusers
from wan_vae.config import VAEConfig
from wan_vae.model import WanVAE
from wan_vae.names import diffusers_names
from wan_vae.stream import StreamState
from wan_vae.testing import difference, randomise
from wan_vae.winograd import Winograd

TOLERANCES = {"direct": 1e-5, "conv2d": 1e-5, "winograd": 5e-5}

CONFIGS = {
    "2.1": VAEConfig(
        base_dim=8, decoder_base_dim=8, z_dim=4, dim_mult=(1, 2, 4, 4), temporal_downsample=(False, True, True), latent_space="test"
    ),
    "2.1, other widths": VAEConfig(
        base_dim=6, decoder_base_dim=10, z_dim=3, dim_mult=(1, 2, 2, 4), temporal_downsample=(True, False, True),
        num_res_blocks=1, latent_space="test",
    ),
    "2.1, two levels less": VAEConfig(
        base_dim=8, decoder_base_dim=8, z_dim=5, dim_mult=(1, 2, 2), temporal_downsample=(True, True), num_res_blocks=1, latent_space="test"
    ),
    "2.2": VAEConfig(
        base_dim=8, decoder_base_dim=12, z_dim=6, dim_mult=(1, 2, 4, 4), temporal_downsample=(False, True, True),
        residual=True, patch_size=2, latent_space="test",
    ),
    "2.2, tiny": VAEConfig(
        base_dim=8, decoder_base_dim=8, z_dim=4, dim_mult=(1, 2, 2), temporal_downsample=(True, True), num_res_blocks=1,
        residual=True, patch_size=2, latent_space="test",
    ),
    "2.2, no patches": VAEConfig(
        base_dim=4, decoder_base_dim=8, z_dim=4, dim_mult=(1, 2, 2), temporal_downsample=(False, True), num_res_blocks=2,
        residual=True, latent_space="test",
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request: pytest.FixtureRequest) -> tuple[WanVAE, AutoencoderKLWan]:
    """Both implementations with the same random weights."""
    config = CONFIGS[request.param]
    vae = WanVAE(config).eval()
    randomise(vae, seed=len(request.param))
    theirs = AutoencoderKLWan.from_config(diffusers_config(config)).eval()
    names = diffusers_names(config)
    theirs.load_state_dict({names[key]: value for key, value in vae.state_dict().items()})
    return vae, theirs


def use(vae: WanVAE, backend: str) -> None:
    """Compute by one backend, every layer that has the shape for it."""
    vae.backend = backend
    vae._winograd = Winograd(min_channels=1)


@torch.no_grad()
@pytest.mark.parametrize("backend", TOLERANCES)
@pytest.mark.parametrize("frames", [1, 5, 13])
def test_encode_and_decode_agree(pair: tuple[WanVAE, AutoencoderKLWan], frames: int, backend: str) -> None:
    vae, theirs = pair
    use(vae, backend)
    tolerance = TOLERANCES[backend]
    generator = torch.Generator().manual_seed(frames)
    time, height, width = vae.spec.stride
    video = torch.rand(1, 3, frames, 2 * height, 3 * width, generator=generator) * 2 - 1
    posterior = theirs.encode(video).latent_dist
    mean, logvar = vae.moments(video)
    assert difference(mean, posterior.mean) <= tolerance
    assert difference(logvar.clamp(-30, 20), posterior.logvar) <= tolerance
    assert difference(vae.encode(video), posterior.mean) <= tolerance
    assert (vae._winograd.filters.bytes_kept > 0) == (backend == "winograd")
    latents = torch.randn(1, vae.spec.latent_channels, 1 + (frames - 1) // time, 2, 3, generator=generator)
    reference = theirs.decode(latents).sample
    assert reference.abs().max() > 0.5
    assert difference(vae.decode(latents), reference) <= tolerance
    assert (
        difference(vae.decode_step(latents, StreamState(carry=False, convolution=vae.convolution("decoder"))).clamp(-1, 1), reference)
        <= tolerance
    )


@torch.no_grad()
@pytest.mark.parametrize("name", ["2.1", "2.2"])
def test_a_folder_of_ours_loads_there_and_back(name: str, tmp_path: Path) -> None:
    statistics = {"latents_mean": (0.5,) * CONFIGS[name].z_dim, "latents_std": (2.0,) * CONFIGS[name].z_dim}
    vae = WanVAE(CONFIGS[name].model_copy(update=statistics)).eval()
    randomise(vae)
    save_diffusers(vae, tmp_path)
    theirs = AutoencoderKLWan.from_pretrained(tmp_path)
    assert theirs.config.latents_std == [2.0] * CONFIGS[name].z_dim
    back = WanVAE.from_pretrained(tmp_path)
    assert back.config == vae.config.model_copy(update={"latent_space": "unknown"})
    assert all(torch.equal(value, back.state_dict()[key]) for key, value in vae.state_dict().items())
    theirs.save_pretrained(tmp_path / "theirs")
    again = WanVAE.from_pretrained(tmp_path / "theirs")
    video = torch.rand(1, 3, 5, 2 * vae.spec.stride[1], vae.spec.stride[2]) * 2 - 1
    assert torch.equal(again.encode(video), vae.encode(video))

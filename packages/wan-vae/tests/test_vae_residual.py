"""Residual VAEs of any levels and strides: shapes, streams, and shortcuts that are what they should be."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_residual import F16T4, F32T8, SMALL, clip, make
from torch import nn
from wan_vae.config import PRESETS, VAEConfig
from wan_vae.model import WanVAE
from wan_vae.plugins import find_vae
from wan_vae.resample import DownLevel, RepeatUp, UpLevel
from wan_vae.setting import config_of
from wan_vae.stream import StreamState
from wan_vae.testing import VAEContract, difference


class TestResidual16x4(VAEContract):
    @pytest.fixture(scope="class")
    @classmethod
    def vae(cls) -> WanVAE:
        return make(F16T4)


class TestResidual32x8(VAEContract):
    cells = (1, 2)

    @pytest.fixture(scope="class")
    @classmethod
    def vae(cls) -> WanVAE:
        return make(F32T8)


@pytest.mark.parametrize(("name", "stride"), [("residual-f16t4", (4, 16, 16)), ("residual-f32t8", (8, 32, 32))])
def test_an_architecture_without_weights_is_listed_and_planned_for_and_not_loaded(name: str, stride: tuple[int, int, int]) -> None:
    spec = find_vae(name)
    with torch.device("meta"):
        vae = spec.resolve()(PRESETS[name])
    assert spec.parameters == sum(parameter.numel() for parameter in vae.parameters())
    assert (spec.stride, vae.spec.stride, spec.weights) == (stride, stride, None)
    assert config_of(spec) is PRESETS[name]
    with pytest.raises(ValueError, match="architecture without weights: train it"):
        spec.load()


@settings(max_examples=12, deadline=None)
@given(
    levels=st.lists(st.tuples(st.sampled_from([1, 2, 4]), st.booleans()), max_size=3),
    first=st.sampled_from([1, 2]),
    patch_size=st.sampled_from([1, 2]),
    residual=st.booleans(),
    chunk=st.integers(0, 2),
)
def test_any_levels_give_their_strides_and_stream(
    levels: list[tuple[int, bool]], first: int, patch_size: int, residual: bool, chunk: int
) -> None:
    vae = make(
        VAEConfig(
            **SMALL,
            dim_mult=(first, *(mult for mult, _ in levels)),
            temporal_downsample=tuple(time for _, time in levels),
            patch_size=patch_size,
            residual=residual,
            chunk=chunk,
            latent_space="test",
        )
    ).double()
    space = patch_size * 2 ** len(levels)
    assert vae.spec.stride == (2 ** sum(time for _, time in levels), space, space)
    video = clip(vae, 4)
    with torch.no_grad():
        output, mean, _ = vae.reconstruct(video)
    assert tuple(mean.shape) == (1, 4, 4, 2, 1)
    latents = vae.encode(video)
    assert difference(latents, vae.normalise(mean)) <= 1e-9
    assert difference(vae.decode(latents), output.clamp(-1, 1)) <= 1e-9


@pytest.mark.parametrize("widths", [(4, 8), (8, 4), (4, 64), (64, 4)])
def test_without_convolutions_a_downsampler_is_space_to_depth_and_its_mean(widths: tuple[int, int]) -> None:
    dim, out_dim = widths
    level = DownLevel(dim, out_dim, 1, down=True, time=True, residual=True)
    _mute(level)
    x = torch.randn(1, dim, 5, 4, 6)
    made = level(x, StreamState(carry=False))
    padded = torch.cat([torch.zeros_like(x[:, :, :1]), x], 2)  # the first frame is paired with none
    for channel in range(out_dim):
        for t, h, w in ((0, 0, 0), (1, 1, 2), (2, 0, 1)):
            folded = [padded[0, c, 2 * t + i, 2 * h + j, 2 * w + k] for c in range(dim) for i in (0, 1) for j in (0, 1) for k in (0, 1)]
            group = 8 * dim // out_dim
            want = torch.stack(folded[channel * group : (channel + 1) * group]).mean() if group else folded[channel * 8 * dim // out_dim]
            assert torch.allclose(made[0, channel, t, h, w], want, atol=1e-6)


@pytest.mark.parametrize("widths", [(8, 4), (4, 4), (64, 4), (4, 64)])
def test_without_convolutions_an_upsampler_is_the_downsampler_s_mirror(widths: tuple[int, int]) -> None:
    dim, out_dim = widths
    level = UpLevel(dim, out_dim, 1, up=True, time=True, residual=True)
    _mute(level)
    x = torch.randn(1, dim, 3, 2, 3)
    made = level(x, StreamState(carry=False))
    assert tuple(made.shape) == (1, out_dim, 5, 4, 6)
    for c, t, h, w in ((0, 0, 0, 0), (1, 1, 1, 0), (out_dim - 1, 4, 3, 5), (2, 2, 0, 3)):
        place = c * 8 + (t + 1) % 2 * 4 + h % 2 * 2 + w % 2  # among the folded channels; the first frame is the second of its pair
        group = max(1, dim // (8 * out_dim))
        start = place * dim // (8 * out_dim)
        want = x[0, start : start + group, (t + 1) // 2, h // 2, w // 2].mean()
        assert torch.allclose(made[0, c, t, h, w], want, atol=1e-6)


def test_levels_that_change_their_width_alone_have_shortcuts() -> None:
    x = torch.randn(1, 4, 2, 2, 2)
    wider = DownLevel(4, 8, 1, down=False, time=False, residual=True)
    _mute(wider)
    blocks = wider.blocks[0](x, StreamState(carry=False))
    assert torch.equal(wider(x, StreamState(carry=False)) - blocks, x.repeat_interleave(2, 1))
    assert torch.equal(RepeatUp(8, 4, 1, 1)(x.repeat_interleave(2, 1), StreamState(carry=False)), x)
    with pytest.raises(ValueError, match="width 4 -> 6: neither of 4 and 6"):
        DownLevel(4, 6, 1, down=False, time=False, residual=True)


def _mute(level: nn.Module) -> None:
    """Without weights, and with the names that a VAE gives its layers."""
    for name, module in level.named_modules():
        module.slot = name  # type: ignore[assignment]
    for parameter in level.parameters():
        nn.init.zeros_(parameter)

"""The VAE: exact sizes, streaming equal to the whole clip, gradients, sampling, normalisation, refusals."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from wan_vae.config import PRESETS, TINY, VAEConfig
from wan_vae.footprint import Meter
from wan_vae.layers import FrameAttention
from wan_vae.model import WanVAE
from wan_vae.plugins import find_vae
from wan_vae.stream import StreamState
from wan_vae.testing import difference, randomise

TOLERANCE = 1e-5
FLAT = VAEConfig(
    base_dim=4, decoder_base_dim=4, z_dim=4, dim_mult=(1, 2, 2), temporal_downsample=(True, True), num_res_blocks=1, latent_space="test"
)
STYLES = {"flat": FLAT, "residual": FLAT.model_copy(update={"residual": True, "patch_size": 2})}


@lru_cache
def _weights(style: str) -> dict[str, Tensor]:
    vae = WanVAE(STYLES[style])
    randomise(vae)
    return vae.state_dict()


def small(style: str = "residual") -> WanVAE:
    vae = WanVAE(STYLES[style]).eval()
    vae.load_state_dict(_weights(style))
    vae.config = vae.config.model_copy(update={"latents_mean": (0.3, -0.2, 0.0, 1.0), "latents_std": (2.0, 0.5, 1.0, 3.0)})
    return vae


def clip(vae: WanVAE, frames: int, batch: int = 1, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 3, frames, vae.spec.stride[1] * 2, vae.spec.stride[2], generator=generator) * 2 - 1


@pytest.mark.parametrize(("name", "parameters", "tensors"), [("wan2.1", 126_892_531, 194), ("wan2.2", 704_688_668, 196)])
def test_published_sizes(name: str, parameters: int, tensors: int) -> None:
    with torch.device("meta"):
        vae = WanVAE(PRESETS[name])
    assert sum(parameter.numel() for parameter in vae.parameters()) == parameters
    assert len(vae.state_dict()) == tensors


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_what_the_plugin_lists(name: str) -> None:
    with torch.device("meta"):
        spec, listed = WanVAE(PRESETS[name]).spec, find_vae(name)
    assert (spec.latent_space, spec.latent_channels, spec.stride) == (listed.latent_space, listed.latent_channels, listed.stride)


@settings(max_examples=12, deadline=None)
@given(style=st.sampled_from(list(STYLES)), sizes=st.lists(st.integers(1, 3), max_size=3))
def test_any_chunks_after_the_first_frame_equal_the_whole_clip(style: str, sizes: list[int]) -> None:
    vae = small(style).double()  # so that rounding does not hide a wrong frame
    video = clip(vae, 1 + 4 * sum(sizes)).double()
    with torch.no_grad():
        mean = vae.moments(video)[0]
        output = vae.reconstruct(video)[0].clamp(-1, 1)
    center, deviation = (
        torch.tensor(values, dtype=video.dtype).view(-1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    whole = (mean - center) / deviation
    chunks = list(vae.encode_stream(video.split([1, *(4 * size for size in sizes)], dim=2)))
    assert [chunk.shape[2] for chunk in chunks] == [1, *sizes]
    assert difference(torch.cat(chunks, 2), whole) <= 1e-9
    assert difference(vae.encode(video), whole) <= 1e-9
    frames = list(vae.decode_stream(whole.split([1, *sizes], dim=2)))
    assert [chunk.shape[2] for chunk in frames] == [1, *(4 * size for size in sizes)]
    assert difference(torch.cat(frames, 2), output) <= 1e-9
    assert difference(vae.decode(whole), output) <= 1e-9


@pytest.mark.parametrize("style", STYLES)
def test_time_is_causal(style: str) -> None:
    vae = small(style)
    video = clip(vae, 13)
    changed = video.clone()
    changed[:, :, 9:] = clip(vae, 4, seed=1)
    one, other = vae.encode(video), vae.encode(changed)
    assert torch.equal(one[:, :, :3], other[:, :, :3])
    assert difference(one[:, :, 3:], other[:, :, 3:]) > 0.01
    later = one.clone()
    later[:, :, 3:] += 1
    assert torch.equal(vae.decode(one)[:, :, :9], vae.decode(later)[:, :, :9])


def test_interleaved_streams_equal_streams_in_turn() -> None:
    vae = small()
    videos = [clip(vae, 9, seed=seed) for seed in (1, 2)]
    streams = [vae.encode_stream(iter(video.split([1, 4, 4], dim=2))) for video in videos]
    rounds = [(next(streams[0]), next(streams[1])) for _ in range(3)]
    for i, video in enumerate(videos):
        assert torch.equal(torch.cat([chunks[i] for chunks in rounds], 2), vae.encode(video))
    latents = [vae.encode(video) for video in videos]
    decoders = [vae.decode_stream(iter(z.split(1, dim=2))) for z in latents]
    rounds = [(next(decoders[0]), next(decoders[1])) for _ in range(3)]
    for i, z in enumerate(latents):
        assert torch.equal(torch.cat([chunks[i] for chunks in rounds], 2), vae.decode(z))


def test_streams_are_lazy_and_hold_no_graph() -> None:
    vae = small()
    taken = []

    def chunks():  # type: ignore[no-untyped-def]
        for chunk in clip(vae, 9).split([1, 4, 4], dim=2):
            taken.append(chunk.shape[2])
            yield chunk

    stream = vae.encode_stream(chunks())
    assert taken == []
    assert not next(stream).requires_grad
    assert taken == [1]
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("style", STYLES)
def test_gradients_reach_every_parameter(style: str) -> None:
    vae = small(style)
    output, mean, logvar = vae.reconstruct(clip(vae, 9), generator=torch.Generator().manual_seed(0))
    (output.square().mean() + mean.square().mean() + logvar.exp().mean()).backward()
    silent = [name for name, p in vae.named_parameters() if p.grad is None or not (p.grad.abs().max() > 0)]
    assert silent == []


def test_reconstruct_samples_where_a_generator_or_training_asks() -> None:
    vae = small()
    video = clip(vae, 5)
    with torch.no_grad():
        plain = vae.reconstruct(video)[0]
        assert torch.equal(plain, vae.reconstruct(video)[0])
        drawn = [vae.reconstruct(video, generator=torch.Generator().manual_seed(seed))[0] for seed in (0, 0, 1)]
        assert torch.equal(drawn[0], drawn[1])
        assert not torch.equal(drawn[0], drawn[2])
        assert not torch.equal(drawn[0], plain)
        assert not torch.equal(vae.train().reconstruct(video)[0], plain)


def test_groups_hold_every_parameter_once() -> None:
    vae = WanVAE()
    groups = vae.parameter_groups()
    assert list(groups) == ["encoder", "encoder_head", "decoder_input", "decoder", "decoder_head"]
    assert sorted(id(p) for group in groups.values() for p in group) == sorted(id(p) for p in vae.parameters())
    assert vae.last_layer is groups["decoder_head"][-2]
    assert vae.last_layer.shape[0] == 3 * vae.config.patch_size**2


def test_fitted_normaliser_gives_latents_of_unit_scale() -> None:
    vae = small()
    batches = [clip(vae, 5, batch=2, seed=seed) for seed in range(3)]
    weights = {key: value.clone() for key, value in vae.state_dict().items()}
    vae.fit_normaliser(iter(batches))
    latents = torch.cat([vae.encode(video) for video in batches]).transpose(0, 1).flatten(1)
    assert latents.mean(1).abs().max() < 1e-4
    assert (latents.std(1, correction=0) - 1).abs().max() < 1e-4
    assert all(torch.equal(value, weights[key]) for key, value in vae.state_dict().items())
    assert difference(vae.decode(vae.encode(batches[0])), vae.reconstruct(batches[0])[0].clamp(-1, 1)) <= TOLERANCE
    with pytest.raises(ValueError, match="at least one"):
        vae.fit_normaliser([])


def test_half_precision_runs_and_stays_near() -> None:
    vae = small()
    video = clip(vae, 5)
    latents = vae.encode(video)
    half = vae.bfloat16().encode(video.bfloat16())
    assert half.dtype == torch.bfloat16
    assert difference(half.float(), latents) < 0.1


def test_statistics_met_in_inference_mode_serve_gradients_too() -> None:
    vae = small()
    vae.config = vae.config.model_copy(update={"latents_mean": (0.25, -0.5, 0.125, 1.0)})  # no other test has these
    with torch.inference_mode():
        vae.encode(clip(vae, 5))
    mean = torch.randn(1, 4, 1, 2, 2, requires_grad=True)
    vae.denormalise(vae.normalise(mean).square()).sum().backward()
    assert mean.grad is not None


def test_filters_with_the_channels_last_compute_the_same() -> None:
    vae, video = small(), clip(small(), 9)
    expected = vae.encode(video)
    vae.spread_channels()
    assert vae.last_layer.is_contiguous(memory_format=torch.channels_last_3d)
    assert difference(vae.encode(video), expected) <= TOLERANCE
    assert difference(vae.decode(expected), small().decode(expected)) <= TOLERANCE


def test_integers_are_refused() -> None:
    with pytest.raises(ValueError, match="uint8, expected numbers in"):
        small().encode(torch.zeros(1, 3, 1, 16, 16, dtype=torch.uint8))


def test_halves_compute_in_types_of_their_own() -> None:
    vae, video = small(), clip(small(), 5)
    latents = vae.encode(video)
    frames = vae.decode(latents)
    vae.set_precision(decode=torch.bfloat16)
    assert torch.equal(vae.encode(video), latents)
    assert vae.decode(latents).dtype == torch.bfloat16
    assert 0 < difference(vae.decode(latents).float(), frames) < 0.1
    assert vae.set_precision(encode=torch.bfloat16, decode=torch.float32).encode(video).dtype == torch.bfloat16
    assert vae.decode(latents).dtype == torch.float32


def test_a_device_that_is_no_cpu_encodes_in_fp32_and_decodes_in_bf16() -> None:
    for dtype, expected in ((None, (torch.float32, torch.bfloat16)), (torch.float16, (torch.float16, torch.float16))):
        vae = WanVAE.from_pretrained("pkg:wan_vae/weights/tiny", dtype=dtype, device="meta")
        assert (vae.quant_conv.weight.dtype, vae.last_layer.dtype) == expected
    assert WanVAE.from_pretrained("pkg:wan_vae/weights/tiny").last_layer.dtype == torch.float32


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 8, 16, 16), "8 frames, expected 1 [+] 4k: the nearest are 5 and 9"),
        ((1, 3, 0, 16, 16), "0 frames, expected 1 [+] 4k: the nearest are 1 and 5"),
        ((1, 3, 5, 20, 16), "height is 20, expected a multiple of 8, such as 16 or 24"),
        ((1, 3, 5, 16, 7), "width is 7, expected a multiple of 8, such as 8"),
        ((1, 4, 5, 16, 16), r"expected \[B, 3, T, H, W\]"),
        ((3, 5, 16, 16), r"\(3, 5, 16, 16\)"),
    ],
)
def test_video_that_does_not_fit_is_refused(shape: tuple[int, ...], message: str) -> None:
    vae = WanVAE(TINY)
    for method in (vae.encode, vae.moments, vae.reconstruct):
        with pytest.raises(ValueError, match=message):
            method(torch.zeros(shape))


def test_chunks_and_latents_that_do_not_fit_are_refused() -> None:
    vae = small()
    stream = vae.encode_stream(clip(vae, 7).split([1, 6], dim=2))
    next(stream)
    with pytest.raises(ValueError, match="6 frames, expected a multiple of 4"):
        next(stream)
    with pytest.raises(ValueError, match="4 frames"):
        next(vae.encode_stream([clip(vae, 4)]))
    with pytest.raises(ValueError, match=r"\(1, 3, 1, 2, 2\), expected \[B, 4, T, H, W\]"):
        vae.decode(torch.zeros(1, 3, 1, 2, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temporal_downsample": (True,)}, "1 flags, expected 2"),
        ({"latents_mean": (0.0,)}, "latents_mean has 1 values, expected 4"),
        ({"latents_std": (1.0,) * 3 + (0.0,)}, "positive"),
        ({"latents_std": (1.0,) * 3 + (float("nan"),)}, "positive"),
        ({"width": 3}, "Extra inputs"),
    ],
)
def test_configurations_that_contradict_themselves_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VAEConfig.model_validate(FLAT.model_dump() | change)


def test_widths_without_a_shortcut_are_refused() -> None:
    with pytest.raises(ValueError, match="no shortcut for a level of width"):
        WanVAE(TINY.model_copy(update={"base_dim": 5, "dim_mult": (1, 3, 7)}))


@torch.no_grad()
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
def test_attention_never_holds_all_scores(memory_format: torch.memory_format) -> None:
    attention, (height, width) = FrameAttention(16).eval(), (40, 50)
    x = torch.randn(1, 16, 1, height, width).contiguous(memory_format=memory_format)
    with Meter() as meter:
        attention(x, StreamState())
    assert meter.peak < 4 * (height * width) ** 2 / 4

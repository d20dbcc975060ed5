"""Streams of LTX-Video's VAE: any chunks give the whole clip's numbers, frames come late by a fixed number, and memory does not grow."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from wan_vae.codecs.ltx import LTXVAE
from wan_vae.codecs.ltx_config import LTXConfig
from wan_vae.codecs.ltx_stream import LTXState, Noise
from wan_vae.footprint import Meter
from wan_vae.testing import difference, randomise

TOLERANCE = 1e-5
DOUBLE = ["compress_all", {"residual": True, "multiplier": 2}]
PLAIN = [["res_x", 1], ["compress_all", {}], ["res_x_y", {}], ["res_x", 1], ["compress_all", {}], ["res_x", 1]]
SMALL: dict[str, Any] = {
    "latent_channels": 4, "encoder_base_channels": 8, "decoder_base_channels": 8, "patch_size": 1, "latent_space": "test",
    "latents_mean": (0.5, -0.25, 0.125, 1.0), "latents_std": (0.5, 2.0, 1.25, 0.75),
}  # fmt: skip
CONFIGS = {
    "plain": LTXConfig(**SMALL, encoder_blocks=PLAIN, decoder_blocks=PLAIN),
    "timed, with noise": LTXConfig(
        **SMALL,
        encoder_blocks=PLAIN,
        decoder_blocks=[["res_x", {"num_layers": 1, "inject_noise": True}], DOUBLE, ["res_x", 2], DOUBLE, ["res_x", 1]],
        timestep_conditioning=True,
    ),
    "folded": LTXConfig(
        **SMALL,
        encoder_blocks=[["res_x", 1], ["compress_space_res", {}], ["compress_time_res", {}], ["res_x", 1], ["compress_all_res", {}]],
        decoder_blocks=[["compress_time", {}], ["res_x", 1], ["compress_space", {}], DOUBLE],
        spatial_padding_mode="replicate",
        timestep_conditioning=True,
    ),
    "causal": LTXConfig(**SMALL, encoder_blocks=PLAIN, decoder_blocks=PLAIN, causal_decoder=True),
}
PARTITIONS = ([1] * 14, [14], [2, 12], [1, 13], [13, 1], [3, 1, 4, 1, 5])


@pytest.fixture(scope="module", params=CONFIGS.values(), ids=CONFIGS)
def vae(request: pytest.FixtureRequest) -> LTXVAE:
    return drawn(request.param)


def drawn(config: LTXConfig) -> LTXVAE:
    vae = LTXVAE(config).eval()
    randomise(vae)
    return vae


def latents(steps: int = 14, batch: int = 1) -> Tensor:
    return torch.randn(batch, 4, steps, 2, 3, generator=torch.Generator().manual_seed(1))


def whole(vae: LTXVAE, z: Tensor) -> Tensor:
    """The clip at once, each convolution over all of its frames."""
    state = LTXState(carry=False, noise=Noise.of(None))
    with torch.no_grad():
        return vae.decode_step(vae.noised(z, state), state).clamp(-1, 1)


def held(vae: LTXVAE) -> list[tuple[str, int]]:
    """Everything that the modules hold, by name, and which tensors they are."""
    found = [(name, id(tensor)) for name, tensor in (*vae.named_parameters(), *vae.named_buffers())]
    return found + [(f"{name}.{key}", id(value)) for name, module in vae.named_modules() for key, value in vars(module).items()]


@pytest.mark.parametrize("sizes", [[1, 4, 4, 4, 4], [1, 16], [17], [5, 8, 4], [9, 8]])
def test_encoding_in_chunks_is_encoding_at_once(vae: LTXVAE, sizes: list[int]) -> None:
    video = torch.rand(2, 3, 17, 8, 12, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        expected = vae.normalise(vae.moments(video)[0])
    parts = list(vae.encode_stream(video.split(sizes, dim=2)))
    assert [part.shape[2] for part in parts] == [-(-size // 4) for size in sizes]
    assert difference(torch.cat(parts, dim=2), expected) <= TOLERANCE


@pytest.mark.parametrize("sizes", PARTITIONS, ids=str)
def test_decoding_in_chunks_is_decoding_at_once(vae: LTXVAE, sizes: list[int]) -> None:
    z = latents(batch=2)
    expected = whole(vae, z)
    assert expected.shape[2] == 1 + 13 * 4
    assert difference(torch.cat(list(vae.decode_stream(z.split(sizes, dim=2))), dim=2), expected) <= TOLERANCE
    assert difference(vae.decode(z), expected) <= TOLERANCE


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_clips_shorter_than_what_the_decoder_sees(vae: LTXVAE, steps: int) -> None:
    z = latents(steps)
    assert difference(torch.cat(list(vae.decode_stream(z.split(1, dim=2))), dim=2), whole(vae, z)) <= TOLERANCE


@pytest.mark.parametrize("sizes", PARTITIONS, ids=str)
def test_frames_come_late_by_the_look_ahead(vae: LTXVAE, sizes: list[int]) -> None:
    session, given, got = vae.decode_session(), 0, 0
    for chunk in latents().split(sizes, dim=2):
        given, got = given + chunk.shape[2], got + session.push(chunk).shape[2]
        assert got == max(0, 1 + 4 * (given - 1) - vae.look_ahead)
    assert got + sum(rest.shape[2] for rest in session.finish()) == 1 + 4 * 13
    assert (vae.look_ahead == 0) == vae.config.causal_decoder


def test_the_look_ahead_is_what_a_frame_depends_on(vae: LTXVAE) -> None:
    """The last latent changes every frame that is not out before it comes, and no other."""
    z = latents()
    changed = z.clone()
    changed[:, :, -1] += 1
    with torch.no_grad():
        state = LTXState(carry=False, noise=Noise([0]))
        moved = (vae.decode_step(changed, LTXState(carry=False, noise=Noise([0]))) - vae.decode_step(z, state)).abs().amax((0, 1, 3, 4))
    out_before = max(0, 1 + 4 * 12 - vae.look_ahead)
    assert moved[:out_before].max() == 0
    assert moved[out_before] > 0


def test_what_a_stream_holds_does_not_grow(vae: LTXVAE) -> None:
    session, sizes, counts = vae.decode_session(), [], []
    warm = 2 + -(-vae.look_ahead // 4)
    for chunk in latents(warm + 40).split(1, dim=2):
        session.push(chunk)
        sizes.append(session.state.nbytes)
        counts.append(len(session.state.history))
    assert len(set(sizes[warm:])) == len(set(counts[warm:])) == 1
    assert sizes[-1] > 0
    ending = [session.state.nbytes for _ in session.finish()]
    assert all(after <= before for before, after in pairwise([sizes[-1], *ending])) or vae.config.causal_decoder
    assert not session.state.history or vae.config.causal_decoder


@pytest.mark.parametrize("half", ["encode", "decode"])
def test_a_longer_stream_takes_no_more_memory(vae: LTXVAE, half: str) -> None:
    """All tensors that are alive at once, with those of the frames that are held back to the end."""
    peaks = []
    for steps in (30, 70):
        with torch.no_grad(), Meter(vae.parameters()) as meter:
            if half == "decode":
                stream = vae.decode_stream(torch.zeros(1, 4, 1, 2, 3) for _ in range(steps))
            else:
                stream = vae.encode_stream(torch.zeros(1, 3, 4 if i else 1, 8, 12) for i in range(steps))
            frames = sum(part.shape[2] for part in stream)
        assert frames == (1 + 4 * (steps - 1) if half == "decode" else steps)
        peaks.append(meter.peak)
    assert peaks[0] == peaks[1] > 0


def test_an_encoding_stream_holds_a_frame_or_two_a_layer(vae: LTXVAE) -> None:
    session, sizes = vae.encode_session(), []
    video = torch.rand(1, 3, 4, 8, 12) * 2 - 1
    session.push(video[:, :, :1])
    for _ in range(20):
        session.push(video)
        sizes.append(session.state.nbytes)
    assert len(set(sizes)) == 1


def test_nothing_is_kept_on_the_model(vae: LTXVAE) -> None:
    before = held(vae)
    stream = vae.decode_stream(latents().split(1, dim=2))
    next(stream)
    list(vae.encode_stream([torch.zeros(1, 3, 5, 8, 12)]))
    assert held(vae) == before
    list(stream)
    assert held(vae) == before


def test_a_frame_is_decoded_from_both_sides() -> None:
    for name, sees_later in (("plain", True), ("causal", False)):
        vae = drawn(CONFIGS[name])
        z = latents(3)
        changed = z.clone()
        changed[:, :, 1] += 1
        assert (vae.decode(z)[:, :, 0] - vae.decode(changed)[:, :, 0]).abs().max().gt(1e-4) == sees_later


def test_latents_depend_on_no_later_frame(vae: LTXVAE) -> None:
    video = torch.rand(1, 3, 9, 8, 12) * 2 - 1
    changed = video.clone()
    changed[:, :, 5:] *= -1
    first, second = vae.encode(video), vae.encode(changed)
    assert torch.equal(first[:, :, :2], second[:, :, :2])
    assert (first[:, :, 2] - second[:, :, 2]).abs().max() > 1e-3


def test_the_chunks_of_a_stream_have_one_size(vae: LTXVAE) -> None:
    session = vae.decode_session()
    session.push(latents(2))
    with pytest.raises(ValueError, match=r"batch, height and width \(1, 2, 3\), this chunk \(2, 2, 3\)"):
        session.push(latents(2, batch=2))
    encoding = vae.encode_session()
    encoding.push(torch.zeros(1, 3, 1, 8, 12))
    with pytest.raises(ValueError, match="a later chunk has 5 frames, expected a multiple of 4"):
        encoding.push(torch.zeros(1, 3, 5, 8, 12))
    assert list(vae.decode_session().finish()) == []


def test_a_session_gives_log_variances() -> None:
    vae = drawn(CONFIGS["plain"])
    video = torch.rand(1, 3, 9, 8, 12) * 2 - 1
    session = vae.encode_session()
    parts = [session.push(chunk, moments=True) for chunk in video.split([1, 8], dim=2)]
    with torch.no_grad():
        expected = vae.moments(video)[1]
    assert expected is not None
    assert difference(torch.cat([logvar for _, logvar in parts], dim=2), expected) <= TOLERANCE
    silent = drawn(CONFIGS["plain"].model_copy(update={"latent_log_var": "none"}))
    with pytest.raises(ValueError, match="encodes no log-variance"):
        silent.encode_session().push(video, moments=True)


@torch.no_grad()
def test_parts_of_a_stream_may_be_computed_under_inference_mode() -> None:
    vae, z = drawn(CONFIGS["timed, with noise"]), latents(6)
    with torch.inference_mode():
        parts = list(vae.decode_stream(z.split(2, dim=2)))
    assert difference(torch.cat(parts, dim=2), whole(vae, z)) <= TOLERANCE

"""Sessions: saved and resumed to the bit, several at once, and nothing computed twice where a stream stands still."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from wan_vae.config import WAN21, VAEConfig
from wan_vae.layers import CausalConv
from wan_vae.model import WanVAE
from wan_vae.testing import difference, randomise
from wan_vae.winograd import Winograd

CONFIG = VAEConfig(
    base_dim=16, decoder_base_dim=16, z_dim=4, dim_mult=(1, 2, 2), temporal_downsample=(True, True), num_res_blocks=1, latent_space="test"
)
STYLES = {"flat": CONFIG, "residual": CONFIG.model_copy(update={"residual": True, "patch_size": 2})}


@pytest.fixture(params=[(style, backend) for style in STYLES for backend in ("direct", "winograd")], ids="-".join)
def vae(request: pytest.FixtureRequest) -> WanVAE:
    style, backend = request.param
    vae = WanVAE(STYLES[style]).eval()
    randomise(vae)
    vae.backend = backend
    vae._winograd = Winograd(min_channels=1)
    return vae


def clip(vae: WanVAE, frames: int, seed: int = 0) -> Tensor:
    unit = vae.spec.stride[1]
    return torch.rand(1, 3, frames, 2 * unit, 3 * unit, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_a_session_saved_and_resumed_goes_on_to_the_bit(vae: WanVAE, tmp_path: Path) -> None:
    video = clip(vae, 13)
    latents = vae.encode(video)
    for session, chunks in ((vae.encode_session, video.split([1, 4, 4, 4], 2)), (vae.decode_session, latents.split(1, 2))):
        first = session()
        whole = [first.push(chunk) for chunk in chunks[:2]]
        save_file(first.state_dict(), tmp_path / "state.safetensors")
        expected = [first.push(chunk) for chunk in chunks[2:]]
        second = session()
        second.load_state_dict(load_file(tmp_path / "state.safetensors"))
        assert second.started
        assert all(torch.equal(second.push(chunk), one) for chunk, one in zip(chunks[2:], expected, strict=True))
        assert len(whole) == 2


def test_states_of_another_half_or_model_are_refused(vae: WanVAE) -> None:
    session = vae.encode_session()
    session.push(clip(vae, 5))
    saved = session.state_dict()
    with pytest.raises(ValueError, match="not a state of this model's decoder: encoder"):
        vae.decode_session().load_state_dict(saved)
    some = next(key for key in saved if key.startswith("history.") and "conv1" in key)
    with pytest.raises(ValueError, match=some.removeprefix("history.")):
        vae.encode_session().load_state_dict({key: value for key, value in saved.items() if key != some})
    with pytest.raises(ValueError, match=some.removeprefix("history.")):
        vae.encode_session().load_state_dict({**saved, some: saved[some][:, 1:]})
    with pytest.raises(ValueError, match=r"encoder\.conv_in"):
        vae.encode_session().load_state_dict({"started": torch.tensor(True)})
    with pytest.raises(ValueError, match="not a state"):
        vae.encode_session().load_state_dict({key: value for key, value in saved.items() if key != "started"})
    other = WanVAE(WAN21.model_copy(update={"base_dim": 4, "decoder_base_dim": 4}))
    with pytest.raises(ValueError, match="not a state of this model's encoder"):
        other.encode_session().load_state_dict({**saved, "history.encoder.strange": torch.zeros(1)})


def test_a_stream_that_changes_its_size_is_refused(vae: WanVAE) -> None:
    session = vae.encode_session()
    session.push(clip(vae, 1))
    with pytest.raises(ValueError, match="start another session"):
        session.push(clip(vae, 4)[..., : vae.spec.stride[2]])


def test_a_buffer_that_is_filled_again_and_again_is_not_taken_for_a_still_stream(vae: WanVAE) -> None:
    chunks = [clip(vae, 1), *[torch.zeros_like(clip(vae, 4))] * 4, *(clip(vae, 4, seed=seed) for seed in range(3))]
    expected = unwatched(vae.encode_session(), tuple(chunks))
    session, buffer, made = vae.encode_session(), torch.empty_like(clip(vae, 4)), [None] * 0
    for chunk in chunks:
        part = buffer[:, :, : chunk.shape[2]].copy_(chunk)
        made.append(session.push(part))
    assert torch.equal(torch.cat(made, 2), expected)


def test_moments_of_a_chunk_are_those_of_the_clip(vae: WanVAE) -> None:
    video, session = clip(vae, 9), vae.encode_session()
    pairs = [session.push(chunk, moments=True) for chunk in video.split([1, 8], 2)]
    with torch.no_grad():
        mean, logvar = vae.moments(video)
    assert (torch.cat([pair[0] for pair in pairs], 2) - mean).abs().max() <= 1e-5
    assert (torch.cat([pair[1] for pair in pairs], 2) - logvar).abs().max() <= 1e-5


def test_a_still_tail_is_not_computed_again_and_equal_to_the_bit(vae: WanVAE) -> None:
    """The conditioning clip of image-to-video: a picture, then zeros; and a film whose last frame is held."""
    for tail in (torch.zeros(1, 3, 1, 1, 1), clip(vae, 1, seed=3)):
        head = clip(vae, 5)
        video = torch.cat([head, tail.expand(1, 3, 120, *head.shape[3:])], 2)
        session, watched = vae.encode_session(), []
        for chunk in video.split([1, *[4] * 31], 2):
            watched.append(session.push(chunk))
        assert session.skipped > 0
        assert torch.equal(torch.cat(watched, 2), unwatched(vae.encode_session(), video.split([1, *[4] * 31], 2)))
        blocks = session.skipped
        session.push(video[:, :, -4:])
        per_chunk = session.skipped - blocks
        assert per_chunk == len(session.state.traces), "in the end every block stands still"
        moving = session.push(clip(vae, 4, seed=9))
        assert session.skipped == blocks + per_chunk, "a stream that moves again is computed again"
        assert not torch.equal(moving, watched[-1])


def test_held_latents_are_not_decoded_again(vae: WanVAE) -> None:
    latents = torch.randn(1, 4, 1, 2, 3).expand(1, 4, 14, 2, 3)
    session = vae.decode_session()
    video = torch.cat([session.push(chunk) for chunk in latents.split(1, 2)], 2)
    assert session.skipped > 0
    assert torch.equal(video, unwatched(vae.decode_session(), latents.split(1, 2)))


def test_one_frame_that_differs_ends_the_shortcut(vae: WanVAE) -> None:
    still = clip(vae, 1).expand(1, 3, 41, *clip(vae, 1).shape[3:]).clone()
    still[0, 0, 30, 0, 0] += 1e-3
    chunks = still.split([1, *[4] * 10], 2)
    session = vae.encode_session()
    assert torch.equal(torch.cat([session.push(chunk) for chunk in chunks], 2), unwatched(vae.encode_session(), chunks))


def test_every_step_compiles_to_one_graph_and_computes_the_same() -> None:
    vae = WanVAE(STYLES["flat"].model_copy(update={"dim_mult": (1, 2), "temporal_downsample": (True,)})).eval()
    randomise(vae)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    video = clip(vae, 7)
    latents = vae.encode(video)
    for session, chunks in ((vae.encode_session, video.split([1, 2, 2, 2], 2)), (vae.decode_session, latents.split(1, 2))):
        plain, compiled = session(), session(compile={"backend": "eager"})
        for chunk in chunks:
            assert difference(compiled.push(chunk), plain.push(chunk)) <= 2e-5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4, "two halves, each with a first chunk and others"


def test_the_first_frame_never_enters_the_history_of_an_upsampler(vae: WanVAE) -> None:
    """In the second chunk the temporal upsampler sees zeros; peers that kept the first frame had colours jump there."""
    latents, session = torch.randn(1, 4, 2, 2, 3, generator=torch.Generator().manual_seed(0)), vae.decode_session()
    temporal = {name for name, _ in vae.named_modules() if name.startswith("decoder") and name.endswith("time_conv")}
    assert temporal
    session.push(latents[:, :, :1])
    assert not any(session.state.history[name].any() for name in temporal)
    session.push(latents[:, :, 1:])
    assert all(session.state.history[name].any() for name in temporal)


def test_every_layer_of_either_half_has_its_own_memory(vae: WanVAE) -> None:
    """A peer sized the memory of the encoder by the layers of the decoder."""
    for session, chunk in ((vae.encode_session(), clip(vae, 5)), (vae.decode_session(), torch.randn(1, 4, 1, 2, 3))):
        session.push(chunk[:, :, :1])
        session.push(chunk[:, :, 1:] if session.half == "encoder" else chunk)
        looking_back = {
            name
            for name, module in vae.named_modules()
            if name.startswith(session.half) and isinstance(module, CausalConv) and module.kernel_size[0] > 1
        }
        assert looking_back <= set(session.state.history)


def unwatched(session: object, chunks: tuple[Tensor, ...]) -> Tensor:
    """The stream with every block computed for every chunk."""
    session.state.watch = lambda chunk: chunk  # type: ignore[attr-defined]
    return torch.cat([session.push(chunk) for chunk in chunks], 2)  # type: ignore[attr-defined]

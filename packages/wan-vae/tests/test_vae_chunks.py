"""Chunks within which convolutions see both ways in time, and across which they see the past."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from process_group import in_processes
from safetensors.torch import load_file, save_file
from sharded import work
from small_residual import F16T4, F32T8, SMALL, clip, make
from torch import Tensor, nn
from wan_vae.checkpoint import save_diffusers, save_official
from wan_vae.codec import VideoCodec
from wan_vae.config import VAEConfig
from wan_vae.latents import LatentFile
from wan_vae.layers import CausalConv, ResBlock
from wan_vae.model import WanVAE
from wan_vae.resample import DownLevel, UpLevel
from wan_vae.setting import Setting
from wan_vae.stream import StreamState
from wan_vae.testing import VAEContract, difference, randomise
from wan_vae.tiling import TiledVAE
from wan_vae.video import read_frames, to_tensor
from wan_vae.winograd import Winograd

PLAIN = VAEConfig(**SMALL, dim_mult=(1, 2, 2), temporal_downsample=(True, False), latent_space="test")  # Wan2.1's style, 2x4x4
STYLES = {"residual": F16T4, "plain": PLAIN}


class TestChunked16x4(VAEContract):
    @pytest.fixture(scope="class")
    @classmethod
    def vae(cls) -> WanVAE:
        return make(F16T4, chunk=2)


class TestChunked32x8(VAEContract):
    cells = (1, 2)

    @pytest.fixture(scope="class")
    @classmethod
    def vae(cls) -> WanVAE:
        return make(F32T8, chunk=2)


class TestChunkedPlain(VAEContract):
    @pytest.fixture(scope="class")
    @classmethod
    def vae(cls) -> WanVAE:
        return make(PLAIN, chunk=2)


@pytest.mark.parametrize("style", STYLES)
def test_a_chunk_is_seen_both_ways_and_a_later_one_never(style: str) -> None:
    vae = make(STYLES[style], chunk=2).double()
    time = vae.config.stride[0]
    video = clip(vae, 6).requires_grad_()  # latents 0 | 1 2 | 3 4 | 5
    mean, _ = vae.moments(video)
    frames = [range(1), *(range(1 + i * time, 1 + (i + 1) * time) for i in range(5))]
    chunk = [0, 1, 1, 2, 2, 3]
    for latent in range(6):
        (slope,) = torch.autograd.grad(mean[:, :, latent].sum(), video, retain_graph=True)
        for other in range(6):
            moved = slope[:, :, list(frames[other])].abs().max()
            assert (moved > 0) == (chunk[other] <= chunk[latent]), f"latent {latent} and the frames of latent {other}"
    z = torch.randn(1, 4, 6, 2, 1, dtype=torch.double, requires_grad=True)
    output = vae.decode_step(z[:, :, :1], state := StreamState())
    state.started = True
    for start, stop in ((1, 3), (3, 5), (5, 6)):
        output = torch.cat([output, vae.decode_step(z[:, :, start:stop], state)], 2)
    for latent in range(6):
        (slope,) = torch.autograd.grad(output[:, :, list(frames[latent])].sum(), z, retain_graph=True)
        for other in range(6):
            assert (slope[:, :, other].abs().max() > 0) == (chunk[other] <= chunk[latent])


class Reference:
    """The VAE over a whole clip without any state: each convolution sees the next frame only where that is of its chunk."""

    def __init__(self, vae: WanVAE, latents: int) -> None:
        self.vae, self.steps = vae, latents - 1

    def conv(self, conv: nn.Conv3d, x: Tensor) -> Tensor:
        pad = conv.kernel_size[1] // 2
        if conv.kernel_size[0] == 1:
            return F.conv3d(x, conv.weight, conv.bias)
        assert conv.kernel_size == (3, 3, 3)
        both = F.conv3d(F.pad(x, (pad, pad, pad, pad, 1, 1)), conv.weight, conv.bias)
        past = F.conv3d(F.pad(x, (pad, pad, pad, pad, 1, 0)), conv.weight[:, :, :2], conv.bias)
        length = self.vae.config.chunk * ((x.shape[2] - 1) // self.steps)
        edge = [t % length == 0 or t == x.shape[2] - 1 for t in range(x.shape[2])]
        return torch.where(torch.tensor(edge).view(-1, 1, 1), past, both)

    def block(self, block: ResBlock, x: Tensor) -> Tensor:
        h = self.conv(block.conv1, F.silu(block.norm1(x)))
        h = self.conv(block.conv2, F.silu(block.norm2(h)))
        return h + (self.conv(block.shortcut, x) if block.shortcut is not None else x)

    def middle(self, middle: nn.Module, x: Tensor) -> Tensor:
        return self.block(middle.block2, middle.attention.attend(self.block(middle.block1, x)))

    def down(self, level: DownLevel, x: Tensor) -> Tensor:
        h = x
        for block in level.blocks:
            h = self.block(block, h)
        if (resample := level.resample) is not None:
            h = F.conv3d(F.pad(h, (0, 1, 0, 1)), resample.conv.weight[:, :, None], resample.conv.bias, (1, 2, 2))
            if resample.time_conv is not None:
                h = torch.cat([h[:, :, :1], F.conv3d(h, resample.time_conv.weight, resample.time_conv.bias, (2, 1, 1))], 2)
        return h if level.shortcut is None else h + level.shortcut(x)

    def up(self, level: UpLevel, x: Tensor) -> Tensor:
        h = x
        for block in level.blocks:
            h = self.block(block, h)
        if (resample := level.resample) is not None:
            if (time := resample.time_conv) is not None:
                rest = F.conv3d(F.pad(h[:, :, 1:], (0, 0, 0, 0, 2, 0)), time.weight, time.bias)
                pairs = torch.stack(rest.chunk(2, 1), 3).flatten(2, 3)
                h = torch.cat([h[:, :, :1], pairs], 2)
            h = h.repeat_interleave(2, 3).repeat_interleave(2, 4)
            h = F.conv3d(h, resample.conv.weight[:, :, None], resample.conv.bias, padding=(0, 1, 1))
        return h if level.shortcut is None else h + level.shortcut(x, StreamState())

    def head(self, head: nn.Module, x: Tensor) -> Tensor:
        return self.conv(head.conv, F.silu(head.norm(x)))

    def reconstruct(self, video: Tensor) -> tuple[Tensor, Tensor]:
        vae, p = self.vae, self.vae.config.patch_size
        b, _, t, h, w = video.shape
        x = video.view(b, 3, t, h // p, p, w // p, p).permute(0, 1, 6, 4, 2, 3, 5).reshape(b, -1, t, h // p, w // p)
        x = self.conv(vae.encoder.conv_in, x)
        for level in vae.encoder.levels:
            x = self.down(level, x)
        x = self.head(vae.encoder.head, self.middle(vae.encoder.middle, x))
        mean = self.conv(vae.quant_conv, x)[:, : vae.config.z_dim]
        x = self.middle(vae.decoder.middle, self.conv(vae.decoder.conv_in, self.conv(vae.post_quant_conv, mean)))
        for level in vae.decoder.levels:
            x = self.up(level, x)
        x = self.head(vae.decoder.head, x)
        return x.view(b, 3, p, p, t, h // p, w // p).permute(0, 1, 4, 5, 3, 6, 2).reshape(video.shape), mean


@pytest.mark.parametrize(("style", "chunk"), [("residual", 2), ("plain", 2), ("plain", 3)])
def test_values_and_gradients_are_those_of_a_pass_without_state(style: str, chunk: int) -> None:
    vae = make(STYLES[style], chunk=chunk).double()
    video = clip(vae, 6).requires_grad_()
    output, mean, _ = vae.reconstruct(video)
    expected, expected_mean = Reference(vae, 6).reconstruct(video)
    assert difference(mean, expected_mean) <= 1e-9
    assert difference(output, expected) <= 1e-9
    inputs = [video, *(parameter for name, parameter in vae.named_parameters() if "quant_conv" not in name)]
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    slopes = torch.autograd.grad((output * weights).sum(), inputs)
    for got, want in zip(slopes, torch.autograd.grad((expected * weights).sum(), inputs), strict=True):
        assert want.abs().max() > 0
        assert difference(got, want) <= 1e-9


@settings(max_examples=12, deadline=None)
@given(style=st.sampled_from(list(STYLES)), chunk=st.integers(1, 3), first=st.integers(1, 3), sizes=st.lists(st.integers(1, 3), max_size=3))
def test_any_chunks_that_are_given_equal_the_whole_clip(style: str, chunk: int, first: int, sizes: list[int]) -> None:
    vae = make(STYLES[style], chunk=chunk).double()
    given_ = [first, *sizes]
    video, time = clip(vae, sum(given_)), vae.config.stride[0]
    with torch.no_grad():
        output, mean, logvar = vae.reconstruct(video)
    latents = vae.normalise(mean)
    frames = [1 + (first - 1) * time, *(size * time for size in sizes)]
    assert difference(torch.cat(list(vae.encode_stream(video.split(frames, 2))), 2), latents) <= 1e-9
    assert difference(torch.cat(list(vae.decode_stream(latents.split(given_, 2))), 2), output.clamp(-1, 1)) <= 1e-9
    session = vae.encode_session()
    pairs = [session.push(part, moments=True) for part in video.split(frames, 2)] + session.finish(moments=True)
    assert difference(torch.cat([pair[1] for pair in pairs], 2), logvar) <= 1e-9
    assert [pair[0].shape for pair in pairs] == [pair[1].shape for pair in pairs]


@pytest.mark.parametrize("backend", ["winograd", "conv2d"])
def test_every_backend_computes_the_same(backend: str) -> None:
    vae = make(PLAIN, chunk=2)
    video = clip(vae, 6).float()
    vae.backend = "direct"
    latents = vae.encode(video)
    frames = vae.decode(latents)
    vae.backend, vae._winograd = backend, Winograd(min_channels=1)
    assert difference(vae.encode(video), latents) <= 2e-5
    assert difference(vae.decode(latents), frames) <= 2e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_waits_is_saved_as_it_came(dtype: torch.dtype) -> None:
    """Latents are denormalised in fp32 before a half in less precision takes them: rounded while they wait, frames would be others."""
    vae = make(PLAIN, chunk=2, latents_mean=(1.0, 2.0, 3.0, 4.0), latents_std=(3.0, 0.3, 1.0, 2.0)).set_precision(decode=dtype)
    latents = torch.randn(1, 4, 5, 2, 3, generator=torch.Generator().manual_seed(0))
    whole, first, second = vae.decode_session(), vae.decode_session(), vae.decode_session()
    whole.push(latents[:, :, :2])
    first.push(latents[:, :, :2])
    second.load_state_dict(first.state_dict())
    for expected, made in zip(*([session.push(latents[:, :, 2:]), *session.finish()] for session in (whole, second)), strict=True):
        assert torch.equal(made, expected)


def test_a_session_waits_is_saved_while_it_waits_and_ends(tmp_path: Path) -> None:
    vae = make(PLAIN, chunk=2)
    latents = torch.randn(1, 4, 6, 2, 3, generator=torch.Generator().manual_seed(0))
    expected = vae.decode(latents)
    first = vae.decode_session()
    made = [first.push(part) for part in latents[:, :, :4].split(1, 2)]
    assert [part.shape[2] for part in made] == [1, 0, 4, 0]
    save_file(first.state_dict(), tmp_path / "state.safetensors")
    second = vae.decode_session()
    second.load_state_dict(load_file(tmp_path / "state.safetensors"))
    made += [second.push(latents[:, :, 4:]), *second.finish()]
    assert [part.shape[2] for part in made[4:]] == [4, 2]
    assert difference(torch.cat(made, 2), expected) <= 1e-6
    for ended in (lambda: second.push(latents), second.state_dict):
        with pytest.raises(ValueError, match="the stream has ended"):
            ended()
    with pytest.raises(ValueError, match="start another session"):
        first.push(latents[..., :2])
    saved = first.state_dict()
    with pytest.raises(ValueError, match="not a state of this model's decoder"):
        make(PLAIN).decode_session().load_state_dict(saved)
    causal = make(PLAIN).decode_session()
    causal.push(latents)
    with pytest.raises(ValueError, match="not a state of this model's decoder: decoder"):
        first.load_state_dict(causal.state_dict())


def test_what_waits_is_not_the_caller_s_buffer() -> None:
    vae = make(PLAIN, chunk=2)
    video = clip(vae, 5).float()
    session, buffer, made = vae.encode_session(), torch.empty_like(video[:, :, :2]), []
    for part in video.split([1, 2, 2, 2, 2], 2):
        made.append(session.push(buffer[:, :, : part.shape[2]].copy_(part)))
    assert difference(torch.cat(made, 2), vae.encode(video)) <= 1e-6


def test_a_still_tail_is_not_computed_again_and_equal_to_the_bit() -> None:
    vae = make(PLAIN, chunk=2)
    video = clip(vae, 3).float()
    video = torch.cat([video, video[:, :, -1:].expand(-1, -1, 40, -1, -1)], 2)
    sessions = vae.encode_session(), vae.encode_session()
    sessions[1].state.watch = lambda chunk: chunk  # type: ignore[method-assign]
    watched, unwatched = (torch.cat([session.push(video), *session.finish()], 2) for session in sessions)
    assert sessions[0].skipped > 0
    assert torch.equal(watched, unwatched)


def test_compiled_steps_compute_the_same() -> None:
    vae = make(PLAIN, chunk=2, dim_mult=(1, 2), temporal_downsample=(True,))
    torch.compiler.reset()
    video = clip(vae, 6).float()
    latents = vae.encode(video)
    for expected, session, given_ in (
        (latents, vae.encode_session(compile={"backend": "eager"}), video),
        (vae.decode(latents), vae.decode_session(compile={"backend": "eager"}), latents),
    ):
        made = [session.push(part) for part in given_.split([1, given_.shape[2] - 1], 2)]
        assert difference(torch.cat([*made, *session.finish()], 2), expected) <= 2e-5


@pytest.mark.parametrize("style", STYLES)
def test_exact_tiles_equal_the_whole(style: str) -> None:
    vae = make(STYLES[style], chunk=2, base_dim=4).double()
    unit = vae.config.stride[1]
    video = clip(vae, 4, cells=(6, 5))
    with torch.no_grad():
        _, mean, logvar = vae.reconstruct(video)
    tiled = TiledVAE(vae, (3 * unit, 2 * unit))
    latents = tiled.encode(video)
    assert difference(latents, vae.normalise(mean)) <= 1e-9
    assert difference(tiled.decode(latents), vae.decode(latents)) <= 1e-9
    session = tiled.encode_session()
    pairs = [session.push(video, moments=True), *session.finish(moments=True)]
    assert difference(torch.cat([pair[1] for pair in pairs], 2), logvar) <= 1e-9
    with pytest.raises(ValueError, match="the stream has ended"):
        session.push(video[:, :, 1:])


def test_blended_tiles_are_the_vae_on_each() -> None:
    vae = make(PLAIN, chunk=2).double()
    video = clip(vae, 4, cells=(4, 4))
    blended = TiledVAE(vae, (8, 16), mode="blend", overlap=0)
    parts = [vae.encode(part) for part in video.split(8, 3)]
    latents = blended.encode(video)
    assert difference(latents, torch.cat(parts, 3)) <= 1e-6
    assert difference(blended.decode(latents), torch.cat([vae.decode(part) for part in latents.split(2, 3)], 3)) <= 1e-6


def test_several_processes_equal_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    config = PLAIN.model_copy(update={"chunk": 2})
    vae = WanVAE(config).eval()
    randomise(vae)
    video = clip(vae, 4, cells=(3, 2)).float()
    latents = torch.randn(1, 4, 4, 3, 2)
    arguments = [(rank, 2, str(tmp_path / "store"), config.model_dump(), video, latents) for rank in range(2)]
    for _, encoded, decoded in in_processes(work, arguments, ["torch", "torch.distributed"], 60):
        assert not isinstance(encoded, str), decoded
        assert difference(torch.from_numpy(encoded), vae.encode(video)) < 1e-5
        assert difference(torch.from_numpy(decoded), vae.decode(latents)) < 1e-5


def test_memory_is_planned_for_whole_chunks() -> None:
    setting = Setting(F16T4.model_copy(update={"chunk": 3}), "decoder", (64, 64))
    assert setting.chunks == (1, 3, 3)


def test_a_real_film_through_files(run: Callable[..., tuple[int, str, str]], real_clips: Path, tmp_path: Path) -> None:
    vae = make(F16T4, chunk=2)
    vae.save_pretrained(tmp_path / "vae")
    source = str(real_clips / "bikes.mp4")
    shared = ("--codec", "vae", "--dtype", "fp32", "--device", "cpu", "--backend", "direct")
    part = ("--frames", "19", "--crop", "64x48+100+60", "--logvar", *shared)
    assert run("encode", source, "a.safetensors", *part)[0] == 0
    assert run("encode", source, "b.safetensors", *part, "--chunk", "3", "--tile", "32x32")[0] == 0
    assert run("decode", "a.safetensors", "back.mkv", "--lossless", *shared)[0] == 0
    pixels = to_tensor(frame[60:108, 100:164] for frame in read_frames(source, limit=19))
    codec = VideoCodec(WanVAE.from_pretrained(tmp_path / "vae"))
    codec.vae.backend = "direct"
    expected, padding = codec.encode(pixels)
    assert (tuple(expected.shape), padding.frames) == ((1, 4, 6, 3, 4), 2)
    for name in ("a", "b"):
        assert difference(torch.cat(list(LatentFile.open(tmp_path / f"{name}.safetensors").chunks(9)), 2), expected) <= 1e-5
        assert load_file(tmp_path / f"{name}.safetensors")["logvar"].shape[0] == 6
    back = to_tensor(read_frames(tmp_path / "back.mkv"))
    assert back.shape == pixels.shape
    assert (back - codec.decode(expected, padding)).abs().max() <= 2 / 255 + 1e-6


def test_the_config_keeps_the_chunk_and_other_layouts_refuse_it(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    vae = make(F16T4, chunk=2)
    vae.save_pretrained(tmp_path / "vae")
    loaded = WanVAE.from_pretrained(tmp_path / "vae")
    assert loaded.config == vae.config
    assert loaded.fingerprint() == vae.fingerprint() != make(F16T4, chunk=3).fingerprint()
    for save, name in ((save_official, "vae.pth"), (save_diffusers, "folder")):
        with pytest.raises(ValueError, match="cannot run a VAE with chunk = 2, which Wan's has not"):
            save(vae, tmp_path / name)
    for to, out in (("official", "out.pth"), ("comfy", "out.safetensors"), ("diffusers", "out")):
        code, _, error = run("convert", "vae", out, "--to", to)
        assert code == 2
        assert "chunk = 2" in error
        assert not (tmp_path / out).exists()
    assert run("convert", "vae", "copy", "--to", "wan")[0] == 0
    assert WanVAE.from_pretrained(tmp_path / "copy").config == vae.config
    with pytest.raises(ValueError, match="chunk"):
        VAEConfig(**{**F16T4.model_dump(), "chunk": -1})


def test_only_whole_kernels_see_ahead() -> None:
    ahead = {name for name, module in make(F16T4, chunk=2).named_modules() if isinstance(module, CausalConv) and module.ahead}
    whole = {name for name, module in make(F16T4).named_modules() if isinstance(module, CausalConv) and module.kernel_size == (3, 3, 3)}
    assert ahead == whole
    assert not any(module.ahead for module in make(F16T4).modules() if isinstance(module, CausalConv))

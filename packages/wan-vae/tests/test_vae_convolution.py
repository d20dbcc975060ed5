"""The convolution backends: each equal to torch's convolution in float64, within memory, and never where it cannot be."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from wan_vae import convolution
from wan_vae.cli import main
from wan_vae.commands.common import BACKENDS
from wan_vae.config import TINY
from wan_vae.convolution import Convolution, resolve_backend
from wan_vae.layers import CausalConv
from wan_vae.model import WanVAE
from wan_vae.testing import difference, randomise
from wan_vae.transformed_filters import transform_filters
from wan_vae.winograd import Winograd

TOLERANCE = 2e-5
CPU, FP32 = torch.device("cpu"), torch.float32


def layer(dim: int, out_dim: int, seed: int = 0) -> CausalConv:
    conv = CausalConv(dim, out_dim, (3, 3, 3)).requires_grad_(False)
    randomise(conv, seed)
    return conv


def by(backend: str) -> Convolution:
    return Convolution(backend, Winograd(min_channels=1) if backend == "winograd" else None)


def reference(conv: nn.Module, x: Tensor, past: Tensor | None) -> Tensor:
    """In float64: the frames remembered, zeros before them, and the chunk."""
    joined = x if past is None else torch.cat([past, x], 2)
    padded = F.pad(joined, (1, 1, 1, 1, x.shape[2] + 2 - joined.shape[2], 0))
    return F.conv3d(padded.double(), conv.weight.double(), conv.bias.double())


@torch.no_grad()
@settings(max_examples=60, deadline=None)
@given(
    backend=st.sampled_from(["direct", "winograd", "conv2d"]),
    sizes=st.tuples(*[st.integers(1, 6)] * 3, *[st.integers(1, 19)] * 2),
    past=st.sampled_from([0, 2]),
    batch=st.integers(1, 2),
    spread=st.booleans(),
)
def test_every_backend_computes_the_convolution(
    backend: str, sizes: tuple[int, int, int, int, int], past: int, batch: int, spread: bool
) -> None:
    dim, out_dim, frames, height, width = sizes
    conv, generator = layer(dim, out_dim), torch.Generator().manual_seed(sum(sizes))
    x = torch.randn(batch, dim, frames, height, width, generator=generator)
    before = torch.randn(batch, dim, past, height, width, generator=generator) if past else None
    if spread:
        x = x.contiguous(memory_format=torch.channels_last_3d)
    assert difference(by(backend)(conv, x, before, 1).double(), reference(conv, x, before)) <= TOLERANCE


@torch.no_grad()
def test_rows_that_are_there_already_take_the_place_of_padding() -> None:
    conv, x = layer(4, 5), torch.randn(1, 4, 4, 14, 9)
    for backend in ("direct", "winograd", "conv2d"):
        got = by(backend)(conv, x, None, 0)
        assert difference(got.double(), reference(conv, x, None)[:, :, :, 1:-1]) <= TOLERANCE


@torch.no_grad()
def test_frames_in_the_layer_of_an_upsampler_are_convolved_one_by_one() -> None:
    conv, x = nn.Conv2d(4, 6, 3, padding=1), torch.randn(1, 4, 3, 8, 12)
    expected = torch.stack([conv(x[:, :, t]) for t in range(3)], 2)
    for backend in ("direct", "winograd", "conv2d"):
        assert difference(by(backend)(conv, x, None, 1), expected) <= TOLERANCE


@torch.no_grad()
@settings(max_examples=30, deadline=None)
@given(sizes=st.tuples(*[st.integers(1, 5)] * 3, *[st.integers(1, 19)] * 2), batch=st.integers(1, 2), spread=st.booleans())
def test_a_doubled_picture_is_convolved_without_being_made(sizes: tuple[int, int, int, int, int], batch: int, spread: bool) -> None:
    dim, out_dim, frames, height, width = sizes
    conv, x = nn.Conv2d(dim, out_dim, 3, padding=1), torch.randn(batch, dim, frames, height, width)
    randomise(conv, sum(sizes))
    if spread:
        x = x.contiguous(memory_format=torch.channels_last_3d)
    wide = x.double().repeat_interleave(2, 3).repeat_interleave(2, 4)
    expected = F.conv3d(wide, conv.weight.double().unsqueeze(2), conv.bias.double(), padding=(0, 1, 1))
    for backend in ("direct", "winograd", "conv2d"):
        assert difference(by(backend).doubled(conv, x).double(), expected) <= TOLERANCE


def test_filters_are_kept_within_the_budget_and_larger_pictures_come_first() -> None:
    size = 4 * 4 * 36 * 8 * 8
    winograd = Winograd(budget=2 * size, min_channels=1)
    small, middle, large = layer(8, 8), layer(8, 8), layer(8, 8)
    assert winograd.filters.of(small, "pairs", 10) is not None
    assert winograd.filters.of(middle, "pairs", 20) is not None
    assert winograd.filters.bytes_kept == 2 * size
    assert winograd.filters.of(large, "pairs", 30) is not None  # takes the place of `small`
    assert winograd.filters.of(small, "pairs", 10) is None
    assert winograd.filters.bytes_kept == 2 * size
    assert winograd.filters.of(middle, "pairs", 20) is winograd.filters.of(middle, "pairs", 20)
    winograd.filters.drop([middle])
    assert winograd.filters.bytes_kept == size


@torch.no_grad()
def test_a_spent_budget_is_computed_directly() -> None:
    conv, x = layer(8, 8), torch.randn(1, 8, 2, 8, 8)
    got = Convolution("winograd", Winograd(budget=0, min_channels=1))(conv, x, None, 1)
    assert torch.equal(got, Convolution("direct")(conv, x, None, 1))


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "in place": lambda conv: conv.weight.mul_(2),
    "behind autograd": lambda conv: conv.weight.data.mul_(2),
    "data replaced": lambda conv: setattr(conv.weight, "data", 2 * conv.weight.data),
    "assigned": lambda conv: conv.load_state_dict({key: 2 * value for key, value in conv.state_dict().items()}, assign=True),
}


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_transformed_again(change: str) -> None:
    conv, x, compute = layer(8, 8), torch.randn(1, 8, 4, 8, 8), by("winograd")
    for _ in range(2):
        compute(conv, x, None, 1)
        CHANGES[change](conv)
    assert difference(compute(conv, x, None, 1).double(), reference(conv, x, None)) <= TOLERANCE


def test_weights_made_in_inference_mode_are_transformed() -> None:
    with torch.inference_mode():
        conv, x = layer(8, 8), torch.randn(1, 8, 4, 8, 8)
        assert difference(by("winograd")(conv, x, None, 1).double(), reference(conv, x, None)) <= TOLERANCE


def test_other_backends_give_the_memory_of_the_filters_back() -> None:
    vae = WanVAE(TINY).eval()
    vae.backend, vae._winograd = "winograd", Winograd(min_channels=1)
    vae.encode(torch.zeros(1, 3, 5, 16, 16))
    assert vae._winograd.filters.bytes_kept > 0
    vae.backend = "direct"
    assert vae._winograd.filters.bytes_kept == 0


def test_a_half_in_bf16_leaves_the_other_to_winograd() -> None:
    vae = WanVAE(TINY).eval()
    vae.backend, vae._winograd = "winograd", Winograd(min_channels=1)
    vae.set_precision(decode=torch.bfloat16)
    latents = vae.encode(torch.zeros(1, 3, 5, 16, 16))
    assert vae._winograd.filters.bytes_kept > 0
    assert vae.decode(latents).dtype == torch.bfloat16
    assert vae._winograd.filters.bytes_kept == 0


def test_the_present_frame_alone_uses_the_filters_of_the_stream() -> None:
    conv, winograd = layer(8, 8), Winograd(min_channels=1)
    pairs = winograd.filters.of(conv, "pairs", 64)
    last = winograd.filters.of(conv, "last", 64)
    assert pairs is not None
    assert last is not None
    assert last.data_ptr() == pairs[-1:].data_ptr()
    assert torch.equal(last, transform_filters(conv.weight, "last"))


def test_gradients_are_computed_directly() -> None:
    vae = WanVAE(TINY)
    randomise(vae)
    vae.backend, vae._winograd = "winograd", Winograd(min_channels=1)
    video = (torch.rand(1, 3, 5, 16, 16) * 2 - 1).requires_grad_()
    (slope,) = torch.autograd.grad(vae.reconstruct(video)[0].square().mean(), video)
    assert slope.abs().max() > 0
    assert vae._winograd.filters.bytes_kept == 0
    vae.encode(video.detach())
    assert vae._winograd.filters.bytes_kept > 0


def test_auto_is_winograd_where_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    gigabyte = 10**9
    for free, expected in ((64 * gigabyte, "winograd"), (2 * gigabyte, "direct")):
        monkeypatch.setattr(convolution, "free_memory", lambda free=free: free)
        assert resolve_backend("auto", CPU, FP32, gigabyte) == expected
        assert resolve_backend("auto", CPU, torch.bfloat16, gigabyte) == "direct"
        assert resolve_backend("auto", CPU, FP32, 0) == "direct"
    assert resolve_backend("auto", torch.device("mps"), FP32, 1) == "conv2d"
    assert resolve_backend("auto", torch.device("cuda"), FP32, 1) == "direct"


def test_backends_that_are_unknown_or_cannot_run_are_refused() -> None:
    vae = WanVAE(TINY)
    with pytest.raises(ValueError, match="unknown convolution backend 'fast', expected one of auto, direct, winograd, conv2d"):
        vae.backend = "fast"
    with pytest.raises(ValueError, match="computes in fp32 on a CPU, not in bfloat16 on cpu"):
        vae.bfloat16().backend = "winograd"
    assert vae.backend == "direct"


def test_copies_and_pickles_of_a_model_start_without_filters(tmp_path: Path) -> None:
    vae = WanVAE(TINY).eval()
    randomise(vae)
    vae.backend, vae._winograd = "winograd", Winograd(min_channels=1)
    video = torch.rand(1, 3, 5, 16, 16) * 2 - 1
    latents = vae.encode(video)
    torch.save(vae, tmp_path / "vae.pth")
    for other in (copy.deepcopy(vae), torch.load(tmp_path / "vae.pth", weights_only=False)):
        assert other._winograd.filters.bytes_kept == 0
        assert torch.equal(other.encode(video), latents)


def test_the_commands_know_every_backend() -> None:
    assert BACKENDS == convolution.BACKENDS


@pytest.mark.parametrize(("codec", "backend"), [("wan2.1", "winograd"), ("tiny", "direct")])
def test_info_says_what_auto_would_choose(
    codec: str, backend: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(convolution, "free_memory", lambda: 10**12)
    assert main(["info", "--codec", codec, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["backend"] == backend

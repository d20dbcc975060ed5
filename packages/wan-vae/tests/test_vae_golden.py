"""Numbers of the official VAEs, through our official-layout loader."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from wan_vae.convolution import BACKENDS
from wan_vae.layers import CausalConv
from wan_vae.model import WanVAE
from wan_vae.resample import Upsample
from wan_vae.stream import StreamState
from wan_vae.winograd import Winograd

pytestmark = pytest.mark.golden
FOLDER = Path(os.environ.get("WAN_GOLDEN") or Path(__file__).parent / "golden")
CASES = ("vae_21", "vae_22")
COMPUTED = [backend for backend in BACKENDS if backend != "auto"]


class Case:
    """One golden case: its JSON, its tensors and the VAE loaded from a file with its official weights."""

    def __init__(self, name: str, folder: Path) -> None:
        self.about = json.loads((FOLDER / f"{name}.json").read_text())
        self.tensors = load_file(FOLDER / f"{name}.safetensors")
        weights = {key.removeprefix("weights/"): value for key, value in self.tensors.items() if key.startswith("weights/")}
        save_file(weights, folder / f"{name}.safetensors")
        self.vae = WanVAE.from_pretrained(folder / f"{name}.safetensors")
        statistics = {f"latents_{key}": tuple(self.tensors[f"inputs/{key}"].tolist()) for key in ("mean", "std")}
        self.vae.config = self.vae.config.model_copy(update=statistics)

    def calls(self, method: str) -> list[tuple[str, Tensor]]:
        """Name and argument of every call of a method."""
        calls = [call for call in self.about["calls"] if call["method"] == method]
        assert calls
        return [(call["name"], self.tensors[next(iter(call["args"].values()))]) for call in calls]

    def output(self, call: str, name: str) -> Tensor:
        return self.tensors[f"outputs/{call}/{name}"]

    def close(self, got: Tensor, expected: Tensor) -> bool:
        tolerance = self.about["tolerance"]
        return got.shape == expected.shape and torch.allclose(got, expected, atol=tolerance["atol"], rtol=tolerance["rtol"])

    def kept(self, video: Tensor) -> Tensor:
        """The leading frames that the official encoder looks at."""
        return video[:, :, : 1 + (video.shape[2] - 1) // self.vae.spec.stride[0] * self.vae.spec.stride[0]]


@pytest.fixture(scope="module", params=[(name, backend) for name in CASES for backend in COMPUTED], ids="-".join)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    name, backend = request.param
    return computed_by(Case(name, tmp_path_factory.mktemp("official")), backend)


def computed_by(case: Case, backend: str) -> Case:
    """The case by one backend, every layer that has the shape for it: these models are 3 to 12 channels wide."""
    case.vae.backend = backend
    case.vae._winograd = Winograd(min_channels=1)
    return case


def test_the_configuration_is_read_from_the_shapes(case: Case) -> None:
    config, official = case.vae.config, case.about["config"]
    assert config.base_dim == official["dim"]
    assert config.decoder_base_dim == official.get("dec_dim", official["dim"])
    assert config.z_dim == official["z_dim"]
    assert list(config.dim_mult) == official["dim_mult"]
    assert config.num_res_blocks == official["num_res_blocks"]
    assert list(config.temporal_downsample) == official["temperal_downsample"]


@torch.no_grad()
def test_moments_and_normalised_latents(case: Case) -> None:
    for name, video in case.calls("encode"):
        mean, logvar = case.vae.moments(case.kept(video))
        assert case.close(mean, case.output(name, "mean")), name
        assert case.close(logvar, case.output(name, "log_var")), name
        assert case.close(case.vae.encode(case.kept(video)), case.output(name, "mean_normalised")), name


def test_frames_that_the_official_code_drops_are_refused(case: Case) -> None:
    tails = [video for _, video in case.calls("encode") if case.kept(video).shape != video.shape]
    assert tails
    for video in tails:
        below = case.kept(video).shape[2]
        with pytest.raises(ValueError, match=f"{video.shape[2]} frames.*nearest are {below} and {below + case.vae.spec.stride[0]}"):
            case.vae.encode(video)


@torch.no_grad()
def test_decoded_video(case: Case) -> None:
    for name, latents in case.calls("decode"):
        expected = case.output(name, "video")
        assert case.close(case.vae.decode(latents), expected.clamp(-1, 1)), name
        whole = case.vae.decode_step(case.vae.denormalise(latents), StreamState(carry=False, convolution=case.vae.convolution("decoder")))
        assert case.close(whole, expected), f"{name}, unclamped and in one chunk"


def test_first_frame_as_history_of_the_upsampler_would_be_noticed(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The known mistake: in the second chunk the temporal upsampler must see zeros, not the first frame."""
    right = Upsample._double_time

    def remember_first(self: Upsample, time_conv: CausalConv, x: Tensor, state: StreamState) -> Tensor:
        made = right(self, time_conv, x, state)
        if not state.started and state.carry:
            state.history[time_conv.slot][:, :, -1:] = x[:, :, :1]
        return made

    monkeypatch.setattr(Upsample, "_double_time", remember_first)
    for name, latents in case.calls("decode"):
        expected = case.output(name, "video").clamp(-1, 1)
        assert case.close(case.vae.decode(latents), expected) == (latents.shape[2] == 1), name

"""Tiny decoders in the layout of TAEHV: the numbers of madebyollin/taehv, the contract of a VAE, streams, files and commands."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from wan_vae import VideoCodec, load_vae
from wan_vae.checkpoint import describe, save_official
from wan_vae.cli import main
from wan_vae.codecs.taehv import TAEHV, Memory
from wan_vae.codecs.taehv_config import TAEW21, TAEW22, TAEHVConfig, infer_config
from wan_vae.latents import LatentFile
from wan_vae.model import WanVAE
from wan_vae.plugins import find_vae
from wan_vae.testing import VAEContract, difference, randomise
from wan_vae.tiling import TiledVAE
from wan_vae.video import probe

SUPER22 = TAEW22.model_copy(update={"wide_blocks": True, "decoder_dims": (512, 256, 128, 64)})
SMALL = TAEHVConfig(z_dim=16, encoder_dim=8, decoder_dims=(12, 10, 8, 6), latent_space="wan2.1")


def numbers(shape: tuple[int, ...], salt: int) -> Tensor:
    """float64 between -0.5 and 0.5: element n is (7919 n + 104729 salt) mod 10007 / 10007 - 0.5."""
    n = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return ((n * 7919 + salt * 104729) % 10007 / 10007 - 0.5).reshape(shape)


def known_weights(vae: TAEHV) -> TAEHV:
    """The i-th tensor by name is numbers(shape, i) * sqrt(24 / inputs) of a matrix, 0.1 * numbers of a bias; 0.5 more of the last."""
    state = {}
    for i, (name, value) in enumerate(sorted(vae.state_dict().items())):
        scale = (24 / value[0].numel()) ** 0.5 if value.ndim > 1 else 0.1
        state[name] = (numbers(tuple(value.shape), i) * scale + 0.5 * (name == "decoder.22.bias")).float()
    vae.load_state_dict(state)
    return vae.eval()


# mean, deviation and every quarter's first value of what madebyollin/taehv at 1f14a56 computes with these weights, in fp32
GOLDEN: dict[str, tuple[TAEHVConfig, tuple[float, float, list[float]], tuple[float, float, list[float]]]] = {
    "taew2_1": (
        TAEW21,
        (
            -0.015979424888630293,
            0.21776746685196338,
            [-0.1168368011713028, 0.10720138251781464, -0.23156286776065826, -0.022487007081508636],
        ),
        (0.034891283685732404, 0.4578915131764076, [-0.021066665649414062, 0.40240705013275146, 0.5520317554473877, 0.21962881088256836]),
    ),
    "taew2_2": (
        TAEW22,
        (
            -0.000993067997990659,
            0.09791445794628527,
            [-0.06897035241127014, -0.052008844912052155, 0.12065565586090088, 0.037366241216659546],
        ),
        (0.001486735363824316, 0.2190192064830987, [0.07595539093017578, 0.09433352947235107, 0.011241436004638672, -0.2799990773200989]),
    ),
    "taew2_2_super": (
        SUPER22,
        (0.0006706105674244032, 0.1285556306305367, [-0.09108470380306244, 0.04115834832191467, 0.09383046627044678, 0.03363621234893799]),
        (0.006237427028539924, 0.8445180607012435, [-0.31502437591552734, -1.0, 0.8868951797485352, -0.2363985776901245]),
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_the_numbers_of_the_original(name: str) -> None:
    config, encoded, decoded = GOLDEN[name]
    vae = known_weights(TAEHV(config))
    side = config.stride[1]
    video = (2 * numbers((1, 3, 9, 2 * side, 3 * side), 1)).float()
    latents = (4 * numbers((1, config.z_dim, 3, 2, 3), 2)).float()
    for got, (mean, deviation, values) in ((vae.encode(video), encoded), (vae.decode(latents), decoded)):
        assert got.double().mean() == pytest.approx(mean, abs=1e-6)
        assert got.double().std() == pytest.approx(deviation, abs=1e-6)
        assert got.flatten()[:: got.numel() // 4].tolist()[:4] == pytest.approx(values, abs=2e-5)


@pytest.mark.parametrize(("name", "parameters", "tensors"), [("taew2_1", 11_315_539, 128), ("taew2_2", 11_418_108, 128)])
def test_sizes_of_the_released_files(name: str, parameters: int, tensors: int) -> None:
    with torch.device("meta"):
        state = TAEHV({"taew2_1": TAEW21, "taew2_2": TAEW22}[name]).state_dict()
    assert (sum(value.numel() for value in state.values()), len(state)) == (parameters, tensors)
    spec = find_vae(name)
    assert (spec.parameters, spec.resolve()) == (parameters, TAEHV)
    expected = TAEHV({"taew2_1": SMALL, "taew2_2": TAEW22}[name]).spec
    assert (spec.latent_space, spec.latent_channels, spec.stride) == (expected.latent_space, expected.latent_channels, expected.stride)
    assert {"decoder.22.bias", "decoder.7.conv.weight", "encoder.4.conv.0.weight", "encoder.17.bias"} <= set(state)


class TestSmall(VAEContract):
    @pytest.fixture(scope="class", params=[SMALL, SMALL.model_copy(update={"patch_size": 2}), "super"], ids=["base", "patches", "super"])
    @classmethod
    def vae(cls, request: pytest.FixtureRequest) -> Any:
        config = SMALL.model_copy(update={"wide_blocks": True}) if request.param == "super" else request.param
        vae = TAEHV(config).eval()
        randomise(vae)
        return vae


@pytest.fixture(scope="module")
def vae() -> TAEHV:
    vae = TAEHV(SMALL).eval()
    randomise(vae)
    return vae


def test_latents_come_when_their_frames_are_there(vae: TAEHV) -> None:
    taken = 0

    def chunks() -> Any:
        nonlocal taken
        for size in (1, 4, 8):
            taken += size
            yield torch.rand(1, 3, size, 8, 16) * 2 - 1

    arrived = [(taken, latents.shape[2]) for latents in vae.encode_stream(chunks())]
    assert arrived == [(5, 1), (13, 2), (13, 1)]


def test_the_last_frame_is_repeated_to_fill_the_last_latent(vae: TAEHV) -> None:
    video = torch.rand(1, 3, 5, 8, 8) * 2 - 1
    filled = torch.cat([video, *[video[:, :, -1:]] * 3], dim=2)
    with torch.no_grad():
        assert torch.equal(
            vae.encode(video), torch.cat([vae.encode_step(part, memory) for memory in [Memory()] for part in filled.split(4, 2)], 2)
        )


def test_the_first_frames_of_the_first_latent_are_dropped(vae: TAEHV) -> None:
    latents = torch.randn(1, 16, 3, 2, 2)
    with torch.no_grad():
        memory = Memory()
        first, rest = vae.decode_step(latents[:, :, :1], memory), vae.decode_step(latents[:, :, 1:], memory)
    assert (first.shape[2], rest.shape[2]) == (1, 8)
    assert torch.equal(vae.decode(latents[:, :, :1]), first)
    assert difference(torch.cat([first, rest], 2), vae.decode(latents)) <= 1e-5


def test_frames_depend_on_the_frames_before(vae: TAEHV) -> None:
    latents = torch.randn(1, 16, 3, 2, 2)
    changed = latents.clone()
    changed[:, :, 0] += 1
    assert (vae.decode(latents)[:, :, -1] - vae.decode(changed)[:, :, -1]).abs().max() > 1e-3
    changed = latents.clone()
    changed[:, :, 2] += 1
    assert torch.equal(vae.decode(latents)[:, :, :5], vae.decode(changed)[:, :, :5])


def test_memory_is_the_callers_and_can_be_saved(vae: TAEHV, tmp_path: Path) -> None:
    latents, memory = torch.randn(1, 16, 4, 2, 2), Memory()
    with torch.no_grad():
        vae.decode_step(latents[:, :, :2], memory)
        save_file(memory, tmp_path / "memory.safetensors")
        later = vae.decode_step(latents[:, :, 2:], load_file(tmp_path / "memory.safetensors"))
    assert difference(later, vae.decode(latents)[:, :, 5:]) <= 1e-5


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_file_is_told_by_its_keys(vae: TAEHV, tmp_path: Path, suffix: str, dtype: torch.dtype) -> None:
    path = tmp_path / f"taew2_1{suffix}"
    save_official(TAEHV(SMALL).to(dtype), path)
    assert describe(path) == vae.spec
    loaded = load_vae(str(path))
    assert isinstance(loaded, TAEHV)
    assert loaded.config == SMALL
    assert next(loaded.parameters()).dtype == torch.float32
    (tmp_path / "config.json").write_text('{"format": "wan-vae/1"}')  # of something else in the same folder
    assert isinstance(load_vae(str(path)), TAEHV)


def test_a_folder_of_ours_there_and_back(vae: TAEHV, tmp_path: Path) -> None:
    config = SMALL.model_copy(update={"latent_space": "mine-1", "temporal_downsample": (False, True, True)})
    mine = TAEHV(config).eval()
    mine.save_pretrained(tmp_path / "mine")
    assert json.loads((tmp_path / "mine" / "config.json").read_text())["format"] == "wan-taehv/1"
    for source in (tmp_path / "mine", tmp_path / "mine" / "model.safetensors"):
        back = load_vae(str(source))
        assert (back.config, back.fingerprint()) == (config, mine.fingerprint())
    (tmp_path / "mine" / "config.json").unlink()
    assert load_vae(str(tmp_path / "mine")).spec.latent_space == "unknown"


def shapes(config: TAEHVConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {key: tuple(value.shape) for key, value in TAEHV(config).state_dict().items()}


@pytest.mark.parametrize(
    ("config", "name", "space"),
    [
        (TAEW21, "taew2_1.pth", "wan2.1"),
        (TAEW21, "lighttaew2_1.safetensors", "wan2.1"),
        (TAEW21, "taehv.pth", "unknown"),  # of HunyuanVideo, in the same shapes
        (TAEW22, "any.pth", "wan2.2"),
        (SUPER22, "taew2_2_super.pth", "wan2.2"),
        (TAEW22.model_copy(update={"z_dim": 32}), "taehv1_5.pth", "unknown"),
    ],
)
def test_whose_latents_they_are(config: TAEHVConfig, name: str, space: str) -> None:
    assert infer_config(shapes(config), Path(name)) == config.model_copy(update={"latent_space": space})


def test_what_does_not_fit_is_named(vae: TAEHV, tmp_path: Path) -> None:
    path = tmp_path / "taew2_1.safetensors"
    for change, message in (
        ({"decoder.3.conv.2.weight": None}, r"missing 1 \(decoder\.3\.conv\.2\.weight\)"),
        ({"decoder.13.conv.weight": None}, r"missing or misshapen 'decoder\.13\.conv\.weight'"),
        ({"decoder.13.conv.weight": torch.zeros(30, 10, 1, 1)}, "expected a factor of 1 or 2"),
        ({"decoder.7.conv.weight": torch.zeros(24, 12, 1, 1)}, "the encoder takes 4 frames to a latent, the decoder makes 8"),
        ({"decoder.3.conv.0.bias": torch.zeros(3)}, r"'decoder\.3\.conv\.0\.bias' is \(3,\), expected \(12,\)"),
        ({"extra.weight": torch.zeros(3)}, r"unexpected 1 \(extra\.weight\)"),
        ({"decoder.22.bias": torch.zeros(3, dtype=torch.float16)}, "mixes types"),
        ({"decoder.22.bias": torch.full((3,), torch.nan)}, "holds NaN"),
    ):
        state = {**vae.state_dict(), **change}
        save_file({key: value for key, value in state.items() if value is not None}, path)
        with pytest.raises(ValueError, match=message):
            TAEHV.from_pretrained(path)
    for name in ("taecvx", "taeh3"):
        with pytest.raises(ValueError, match="count frames in another way"):
            infer_config(shapes(SMALL), Path(f"{name}.pth"))


def test_weights_for_the_other_class(vae: TAEHV, tmp_path: Path) -> None:
    tiny, wan = tmp_path / "taew2_1.safetensors", tmp_path / "wan.safetensors"
    save_official(vae, tiny)
    save_official(WanVAE(), wan)
    with pytest.raises(ValueError, match=r"not a Wan VAE: it holds a TAEHV-style tiny decoder; load it with wan_vae\.load_vae"):
        WanVAE.from_pretrained(tiny)
    with pytest.raises(ValueError, match="not a TAEHV-style tiny decoder: it holds a Wan VAE"):
        TAEHV.from_pretrained(wan)
    save_file({key: value for key, value in vae.state_dict().items() if key.startswith("decoder.")}, tiny)
    for read in (TAEHV.from_pretrained, WanVAE.from_pretrained, describe):
        with pytest.raises(ValueError, match="holds the decoder of a TAEHV-style tiny decoder alone"):
            read(tiny)


def test_a_film_through_the_command(
    vae: TAEHV, film: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # which the command replaces for its process
    save_official(vae, "taew2_1.pth")
    film(11, 20, 12)
    assert main(["encode", "film.mp4", "--codec", "taew2_1.pth"]) == 0
    info = LatentFile.open("film.safetensors").info
    assert (info.latent_space, info.frames, info.padding.frames) == ("wan2.1", 11, 2)
    assert main(["decode", "film.safetensors", "--codec", "taew2_1.pth"]) == 0
    back = probe("film.decoded.mp4")
    assert (back.frames, back.width, back.height) == (11, 20, 12)
    assert main(["encode", "film.mp4", "b.safetensors", "--codec", "taew2_1.pth", "--logvar"]) == 2
    assert "gives no log-variance" in capsys.readouterr().err
    latents, padding = VideoCodec(vae).encode(torch.rand(1, 3, 6, 9, 9) * 2 - 1)
    assert VideoCodec(vae).decode(latents, padding).shape == (1, 3, 6, 9, 9)


def test_in_blended_tiles(vae: TAEHV) -> None:
    video = torch.rand(1, 3, 9, 48, 48) * 2 - 1
    tiled = TiledVAE(vae, (48, 48), "blend")  # one tile, which is the whole
    assert difference(tiled.encode(video), vae.encode(video)) <= 1e-5
    tiled = TiledVAE(vae, (32, 32), "blend")
    latents = vae.encode(video)
    assert tiled.encode(video).shape == latents.shape
    assert torch.cat(list(tiled.encode_stream(video.split([1, 8], 2))), 2).shape == latents.shape
    assert tiled.decode(latents).shape == video.shape


def test_its_memory_is_predicted_and_nothing_is_fetched(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TAEHV, "from_pretrained", lambda *_, **__: pytest.fail("weights were asked for"))
    assert main(["plan", "--codec", "taew2_1", "--size", "480x832", "--memory", "100GB"]) == 0
    assert capsys.readouterr().out.count("whole") == 2

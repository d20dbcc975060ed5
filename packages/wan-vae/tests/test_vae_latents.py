"""The latent file: what it records, what it refuses, and that changed bytes never pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from shuffle_vae import ShuffleVAE, UncertainVAE
from signing import save_signed
from wan_vae import VideoCodec, WanVAE
from wan_vae.latents import LatentFile, LatentInfo, Padding, write_latents
from wan_vae.video import Gap, read_frames, to_tensor

Film = Callable[..., Path]
INFO = LatentInfo("c", "", "", "s", Fraction(24), 5, 16, 8, Padding())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_variance_is_stored_beside_the_latents(film: Film, tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "film.safetensors"
    info = VideoCodec(UncertainVAE()).encode_file(film(11), path, logvar=True, dtype=dtype, chunk=2)
    assert info.backend == "shuffled"
    tensors, file = load_file(path), LatentFile.open(path)
    assert set(tensors) == {"latents", "logvar"}
    assert tensors["logvar"].dtype == dtype
    assert torch.allclose(tensors["logvar"].float(), -tensors["latents"].float().square(), atol=0.01)
    assert file.has_logvar
    assert torch.equal(torch.cat(list(file.chunks(2, name="logvar")), dim=2)[0].transpose(0, 1), tensors["logvar"])
    VideoCodec(ShuffleVAE()).decode_file(path, tmp_path / "back.mp4", lossless=True)
    if dtype == torch.float32:
        back, source = (np.stack(list(read_frames(tmp_path / name))) for name in ("back.mp4", "film.mp4"))
        assert np.array_equal(back, source)
    assert {file.name for file in tmp_path.iterdir()} == {"film.mp4", "film.safetensors", "back.mp4"}


def test_log_variance_of_the_wan_architecture(film: Film, tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae, path = WanVAE().eval(), tmp_path / "film.safetensors"
    VideoCodec(vae).encode_file(film(9, 32, 32), path, logvar=True, chunk=2)
    _, logvar = vae.moments(to_tensor(read_frames(tmp_path / "film.mp4")))
    assert torch.allclose(load_file(path)["logvar"].transpose(0, 1)[None], logvar, atol=5e-5)
    assert LatentFile.open(path).info.backend == str(getattr(vae, "backend", ""))


def test_a_vae_without_log_variance_says_so(film: Film, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'shuffle' gives no log-variance while it streams; encode without --logvar"):
        VideoCodec(ShuffleVAE()).encode_file(film(), tmp_path / "film.safetensors", logvar=True)
    VideoCodec(ShuffleVAE()).encode_file(film(), tmp_path / "film.safetensors")
    with pytest.raises(ValueError, match="holds no logvar; encode with --logvar"):
        next(LatentFile.open(tmp_path / "film.safetensors").chunks(name="logvar"))


def test_metadata_survive_a_round_trip() -> None:
    info = dataclasses.replace(
        INFO,
        backend="winograd",
        time_base=Fraction(1, 90000),
        bit_depth=10,
        pixel_aspect=Fraction(4, 3),
        primaries=9,
        transfer=16,
        crop=(1, 2, 3, 4),
        gaps=(Gap(2, 1, "filled"), Gap(5, 0, "cut")),
        rotation=90,
        color_range="limited",
    )
    assert LatentInfo.from_metadata(info.to_metadata()) == info


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": "0"}, "out of range"),
        ({"frames": "99999999999"}, "frames is '99999999999', expected a whole number"),
        ({"frames": "5.0"}, "frames is '5.0'"),
        ({"frames": "٥"}, "frames is '٥'"),
        ({"width": " 16"}, "width is ' 16'"),
        ({"bit_depth": "0"}, "out of range"),
        ({"fps": "nan"}, "fps is 'nan', expected a positive num/den"),
        ({"time_base": "0/1"}, "time_base is '0/1'"),
        ({"crop": "1,2,3"}, "out of range"),
        ({"crop": "a,b,c,d"}, "'a', expected a whole number"),
        ({"gaps": "1:2"}, "a gap is '1:2', expected start:frames:kind"),
        ({"gaps": "4:2:filled"}, "gaps 4:2:filled in 5 frames"),
        ({"normalised": "yes"}, "not normalised"),
    ],
)
def test_metadata_are_read_strictly(change: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LatentInfo.from_metadata({**INFO.to_metadata(), **change})


def test_too_many_gaps_are_refused() -> None:
    with pytest.raises(ValueError, match="300 gaps, a latent file records up to 256"):
        dataclasses.replace(INFO, gaps=tuple(Gap(i, 1, "filled") for i in range(300))).to_metadata()


def test_files_of_the_first_format_are_still_read(film: Film, tmp_path: Path) -> None:
    path = tmp_path / "film.safetensors"
    VideoCodec(ShuffleVAE()).encode_file(film(9), path)
    first = ["codec", "weights", "weights_dtype", "latent_space", "normalised", "fps", "frames", "width", "height"]
    first += ["pad_frames", "pad_right", "pad_bottom", "rotation", "color_range"]
    metadata = LatentFile.open(path).info.to_metadata()
    save_file(load_file(path), path, {"format": "wan-vae-latents/1", **{key: metadata[key] for key in first}})
    file = LatentFile.open(path)
    assert (file.info.frames, file.info.gaps, file.info.time_base) == (9, (), Fraction(1, 24))
    VideoCodec(ShuffleVAE()).decode_file(path, tmp_path / "back.mp4", lossless=True)
    assert len(list(read_frames(tmp_path / "back.mp4"))) == 9


def test_changed_data_and_headers_are_refused(film: Film, tmp_path: Path) -> None:
    path, back, codec = tmp_path / "film.safetensors", tmp_path / "back.mp4", VideoCodec(ShuffleVAE())
    codec.encode_file(film(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:])
    with pytest.raises(ValueError, match=r"film\.safetensors' is damaged: its data do not match their checksum"):
        codec.decode_file(path, back)
    path.write_bytes(whole.replace(b'"fps": "24/1"', b'"fps": "25/1"'))
    with pytest.raises(ValueError, match="its header does not match its checksum"):
        codec.decode_file(path, back)
    path.write_bytes(whole.replace(b'"sha256": "', b'"sha257": "'))
    with pytest.raises(ValueError, match="its header does not match its checksum"):
        LatentFile.open(path)
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="is not a latent file"):
        codec.decode_file(path, back)
    assert not back.exists()


def test_a_copy_that_another_program_saved_is_as_good(film: Film, tmp_path: Path) -> None:
    path, codec = tmp_path / "film.safetensors", VideoCodec(ShuffleVAE())
    codec.encode_file(film(), path)
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(load_file(path), path, metadata)
    LatentFile.open(path).verify()
    assert codec.decode_file(path, tmp_path / "back.mp4").frames == 7


def test_nan_is_refused_with_its_chunk(film: Film, tmp_path: Path) -> None:
    path, back, codec = tmp_path / "film.safetensors", tmp_path / "back.mp4", VideoCodec(ShuffleVAE())
    metadata = codec.encode_file(film(13), path).to_metadata()
    tensors = load_file(path)
    tensors["latents"][2, 5, 0, 0] = float("nan")
    save_signed(tensors, path, metadata)
    with pytest.raises(ValueError, match="holds NaN or infinity in chunk 2 of its latents"):
        codec.decode_file(path, back)
    chunks = [torch.zeros(1, 2, 1, 3, 4), torch.full((1, 2, 1, 3, 4), 1e6)]
    with pytest.raises(ValueError, match=r"the latents of chunk 1 \(latent frames from 1\) hold NaN or infinity in torch.float16"):
        write_latents(tmp_path / "new.safetensors", chunks, lambda: INFO, dtype=torch.float16)
    assert {file.name for file in tmp_path.iterdir()} == {"film.mp4", "film.safetensors"}


def test_a_vae_that_decodes_to_nan_leaves_no_film(film: Film, tmp_path: Path) -> None:
    class Overflowing(ShuffleVAE):
        def decode_stream(self, chunks: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
            for index, video in enumerate(super().decode_stream(chunks)):
                yield video if index < 2 else video * float("inf")

    VideoCodec(ShuffleVAE()).encode_file(film(13), tmp_path / "film.safetensors")
    with pytest.raises(ValueError, match="to NaN from frame 5 on; use --dtype fp32"):
        VideoCodec(Overflowing()).decode_file(tmp_path / "film.safetensors", tmp_path / "back.mp4")
    assert not (tmp_path / "back.mp4").exists()


@pytest.mark.parametrize(
    ("times", "message"),
    [([0, 5, 5, 9, 12, 20, 30], "do not increase from 0"), ([1, 2, 3, 4, 5, 6, 7], "from 0"), ([0, 1], "a time for each frame")],
)
def test_timestamps_that_lie(film: Film, tmp_path: Path, times: list[int], message: str) -> None:
    path, codec = tmp_path / "film.safetensors", VideoCodec(ShuffleVAE())
    metadata = codec.encode_file(film(), path).to_metadata()
    save_signed({**load_file(path), "timestamps": torch.tensor(times)}, path, metadata)
    with pytest.raises(ValueError, match=message):
        codec.decode_file(path, tmp_path / "back.mp4")


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (torch.zeros(1, 3, 5, 8, 8, dtype=torch.uint8), r"got torch.uint8; wan_vae.video.to_tensor makes one of uint8 frames"),
        (torch.full((1, 3, 5, 8, 8), float("nan")), "holds NaN"),
        (torch.full((1, 3, 5, 8, 8), 1.01), r"in \[-1, 1\], got values from 1.01 to 1.01"),
        (torch.full((1, 3, 5, 8, 8), 255.0), "scale 0..255"),
        (torch.full((1, 3, 5, 8, 8), -float("inf")), "got values from -inf"),
        (torch.zeros(1, 4, 5, 8, 8), "expected a video"),
    ],
)
def test_videos_that_are_no_videos(video: torch.Tensor, message: str) -> None:
    for vae in (ShuffleVAE(), WanVAE().eval()):
        with pytest.raises(ValueError, match=message):
            VideoCodec(vae).encode(video)


def test_rounding_beyond_the_range_is_taken() -> None:
    assert VideoCodec(ShuffleVAE()).encode(torch.full((1, 3, 1, 8, 8), 1.0005))[0].shape[2] == 1


def test_latents_that_are_no_latents() -> None:
    for latents in (torch.full((1, 768, 1, 1, 1), float("nan")), torch.zeros(1, 768, 1, 1, 1, dtype=torch.int64)):
        with pytest.raises(ValueError, match="expected finite floating-point latents, got torch"):
            VideoCodec(ShuffleVAE()).decode(latents)
